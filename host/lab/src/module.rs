// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The drivers' modules.

use std::fs;
use std::path::PathBuf;

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
            make(places, tree, "Building the module", &[])?;
            Ok(places.build_for(tree.kernel).join(driver.file()))
        }
    }
}

/// Runs the module's build with more variables for make.
pub(crate) fn make(places: &Places, tree: &Tree, what: &str, variables: &[&str]) -> Result<()> {
    let build = places.build_for(tree.kernel);
    fs::create_dir_all(&build)?;
    let phase = Phase::start(&format!("{what} ({})", tree.kernel), None);
    phase.follow(
        tree.make()?
            .arg(format!("M={}", places.checkout.display()))
            .arg(format!("MO={}", build.display()))
            .args(variables)
            .arg("modules"),
        &places.build().join(format!("module-{}.log", tree.kernel)),
    )?;
    phase.finish();
    Ok(())
}
