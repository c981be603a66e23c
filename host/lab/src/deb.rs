// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Debian packages of the module and of the host's programs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;

/// The packages' version, which is that of the host's programs and of the module (`rust/this_module.rs`).
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Builds the packages.
pub(crate) fn run() -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let packages = build(&places)?;
    println!("The packages are in {}.", packages.display());
    Ok(true)
}

/// Builds them in a copy of the checkout. Returns the directory with the packages, next to the
/// copy.
pub(crate) fn build(places: &Places) -> Result<PathBuf> {
    let packages = places.build().join("deb");
    if packages.exists() {
        fs::remove_dir_all(&packages)?;
    }
    let source = packages.join("source");
    fs::create_dir_all(&source)?;
    // Cargo puts programs of all checkouts in one place.
    let _lock = kernel::lock(&places.cache.join("tools"))?;
    let phase = Phase::start("Building the packages", None);
    phase.follow(
        Command::new("sh")
            .args([
                "-euc",
                "tar --create --exclude-vcs --exclude-vcs-ignores --exclude=./build . | tar --extract --directory=$1",
                "sh",
            ])
            .arg(&source),
        &packages.join("copy.log"),
    )?;
    fs::write(source.join("debian/changelog"), changelog()?)?;
    phase.follow(
        Command::new("dpkg-buildpackage")
            // The build root has all dependencies, but not all of build-essential.
            .args(["--build=binary", "--no-check-builddeps", "--no-sign"])
            .current_dir(&source),
        &packages.join("build.log"),
    )?;
    phase.finish();
    Ok(packages)
}

/// The changelog, from which the packaging tools take the version.
fn changelog() -> Result<String> {
    let date = kernel::output(Command::new("date").arg("--rfc-email"))?;
    Ok(format!(
        "virtio-balloon-rs ({VERSION}) unstable; urgency=medium\n\n  * Version {VERSION}.\n\n \
         -- The virtio_balloon_rs developers <virtio-balloon-rs@localhost>  {date}"
    ))
}

#[cfg(test)]
mod tests {
    use super::VERSION;

    #[test]
    fn the_module_has_the_version_of_the_programs() {
        let module = include_str!("../../../rust/this_module.rs");
        assert!(module.contains(&format!("version={VERSION}\\0")));
    }
}
