// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The module that this repository is about.

use std::path::{Path, PathBuf};
use std::{fs, process};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use vm::Driver;

use crate::kernel::Tree;
use crate::places::Places;
use crate::progress::Phase;

/// Builds the module for a kernel, unless these sources have been built for it before, in whatever checkout.
/// Returns the file that has it.
pub(crate) fn build(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel);
    build_as(
        places,
        tree,
        Driver::Rust,
        &directory,
        "Building the module",
        &[],
    )
}

/// The same for a module that calls memory unused which is not.
pub(crate) fn build_lying(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel).join("lying");
    let variables = [
        "CONFIG_VIRTIO_BALLOON_RS_LIE=y",
        "CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST=n",
    ];
    build_as(
        places,
        tree,
        Driver::Lying,
        &directory,
        "Building a lying module",
        &variables,
    )
}

/// The same for a module that counts how often each part of it is executed.
pub(crate) fn build_counting(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel).join("counting");
    make(
        places,
        tree,
        &directory,
        "Building a counting module",
        // Each function has its counters in a section, and all sections of one name are to be one.
        &[
            "CONFIG_VIRTIO_BALLOON_RS_COVERAGE=y",
            "LDFLAGS_MODULE=--force-group-allocation",
        ],
    )?;
    Ok(directory.join(Driver::Rust.file()))
}

fn build_as(
    places: &Places,
    tree: &Tree,
    driver: Driver,
    directory: &Path,
    what: &str,
    variables: &[&str],
) -> Result<PathBuf> {
    let kept = tree.path.join("modules").join(key(places)?);
    let module = kept.join(driver.file());
    if !module.exists() {
        make(places, tree, directory, what, variables)?;
        fs::create_dir_all(&kept)?;
        // Whoever looks finds all of it or nothing.
        let new = kept.join(format!("{}.new", process::id()));
        fs::copy(directory.join(Driver::Rust.file()), &new)?;
        fs::rename(new, &module)?;
    }
    Ok(module)
}

/// What the module is made of, in a few characters.
pub(crate) fn key(places: &Places) -> Result<String> {
    let mut hash = Sha256::new();
    let mut paths = sources(places, &["rs", "c", "h"])?;
    paths.push("Kbuild".into());
    for path in paths {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(fs::read(places.checkout.join(path))?);
    }
    Ok(format!("{:.12}", format!("{:x}", hash.finalize())))
}

/// The module's sources whose names end like that, as paths in the checkout.
pub(crate) fn sources(places: &Places, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for directory in ["", "rust", "tests/kunit"] {
        let entries = fs::read_dir(places.checkout.join(directory))
            .with_context(|| format!("reading {}", places.checkout.join(directory).display()))?;
        for entry in entries {
            let path = Path::new(directory).join(entry?.file_name());
            if path
                .extension()
                .is_some_and(|this| extensions.iter().any(|&extension| this == extension))
            {
                sources.push(path);
            }
        }
    }
    ensure!(!sources.is_empty(), "there are no sources of the module");
    sources.sort();
    Ok(sources)
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
