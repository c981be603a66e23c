// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clippy, sparse and the formatters, for the module and for the host's programs.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use vm::Kernel;

use crate::places::Places;
use crate::{kernel, module};

/// The host's programs, and their fuzz targets.
const MANIFESTS: &[&str] = &["host/Cargo.toml", "host/fuzz/Cargo.toml"];

/// Runs clippy on everything, and the compiler and sparse on the module's C. A warning is an error.
pub(crate) fn clippy() -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let tree = kernel::build(&places, Kernel::Test)?;
    let clippy = places.build().join("clippy");
    let directory = clippy.join("module");
    // Otherwise clippy would skip files that it has already checked, with warnings.
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    module::make(
        &places.checkout,
        &tree,
        &directory,
        "Clippy: the module",
        &[
            module::WITH_KUNIT,
            "CLIPPY=1",
            "KRUSTFLAGS=-Dwarnings",
            "W=1",
            "KCFLAGS=-Werror",
            "C=2",
            // sparse 0.6.4 does not know a keyword of the kernel's headers, so it is defined as another one.
            // The helpers for Rust have no declarations.
            "CHECK=sparse -D__typeof_unqual__=__typeof__ -Wno-decl -Wsparse-error",
        ],
    )?;
    // The kernel's build only warns when it cannot run sparse.
    let log = fs::read_to_string(directory.join("build.log"))?;
    ensure!(
        log.contains("CHECK   "),
        "sparse has not checked the module's C"
    );
    for manifest in MANIFESTS {
        let status = Command::new("cargo")
            .args([
                "clippy",
                "--release",
                "--locked",
                "--workspace",
                "--all-targets",
            ])
            .args(["--manifest-path", manifest, "--", "-D", "warnings"])
            // Unlike the other objects, all checkouts share those of clippy.
            .env("CARGO_TARGET_DIR", clippy.join("host"))
            .status()?;
        if !status.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Formats everything, or checks whether it is formatted.
pub(crate) fn format(check: bool) -> Result<bool> {
    let places = Places::find()?;
    let check = check.then_some("--check");
    let module = Command::new("rustfmt")
        .args(check)
        .arg("--config-path")
        .arg(kernel::source(&places)?.join(".rustfmt.toml"))
        .args(["--edition", "2021"])
        .args(module::sources(&places, &["rs"])?)
        .status()?;
    let mut good = module.success();
    for manifest in MANIFESTS {
        let host = Command::new("cargo")
            .args(["fmt", "--all", "--manifest-path", manifest, "--"])
            .args(check)
            .status()?;
        good &= host.success();
    }
    Ok(good)
}
