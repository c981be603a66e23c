// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The module that this repository is about.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use vm::Driver;

use crate::kernel::Tree;
use crate::places::Places;
use crate::progress::Phase;

/// Builds the module for a kernel, and returns the file that has it.
pub(crate) fn build(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel);
    make(places, tree, &directory, "Building the module", &[])?;
    Ok(directory.join(Driver::Rust.file()))
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
