// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The drivers' modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use vm::Driver;

use crate::kernel::Tree;
use crate::places::Places;
use crate::progress::Phase;

/// The file that has a driver for a kernel. Builds it when it is this repository's.
pub(crate) fn build(places: &Places, tree: &Tree, driver: Driver) -> Result<PathBuf> {
    match driver {
        Driver::C => Ok(tree.path.join("drivers/virtio").join(driver.file())),
        Driver::Rust => {
            let directory = places.build_for(tree.kernel);
            make(places, tree, &directory, "Building the module", &[])?;
            Ok(directory.join(driver.file()))
        }
    }
}

/// Runs the module's build in `directory`, with more variables for make.
pub(crate) fn make(
    places: &Places,
    tree: &Tree,
    directory: &Path,
    what: &str,
    variables: &[&str],
) -> Result<()> {
    fs::create_dir_all(directory)?;
    let phase = Phase::start(&format!("{what} ({})", tree.kernel), None);
    phase.follow(
        tree.make()?
            .arg(format!("M={}", places.checkout.display()))
            .arg(format!("MO={}", directory.display()))
            .args(variables)
            .arg("modules"),
        &directory.join("build.log"),
    )?;
    phase.finish();
    Ok(())
}
