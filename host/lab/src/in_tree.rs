// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver in a kernel's own source: built in with its KUnit suites, and as a module.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vm::Accel;
use vm::ktap::{self, Case};

use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::report::Report;

/// The driver's directory in the source.
const PLACE: &str = "drivers/virtio/virtio_balloon_rs";

/// All files that were copied there, except a configuration.
const CHECK_STYLE: &str =
    "find $1 -type f ! -name '.*' -print0 | xargs --null perl scripts/checkpatch.pl --terse --file";

/// Writes the series for the kernel. MAINTAINERS has all of its files from the first patch on.
const PATCHES: &str = r#"
    patches/make "$1" "$2" 'A Developer <developer@example.org>'
    cd "$1"
    perl scripts/checkpatch.pl --terse --ignore FILE_PATH_CHANGES "$2"/*.patch
"#;

/// The kernel's own script to run KUnit, which tries KVM first. If KVM cannot run a kernel, /dev/kvm must not exist.
/// With modules, so that the next step does not rebuild everything.
const KUNIT: &str = r#"
    [ "$1" = kvm ] || [ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
    exec python3 tools/testing/kunit/kunit.py run --arch=x86_64 --kunitconfig="$2" --kconfig_add=CONFIG_MODULES=y \
        --kernel_args=virtio_balloon_rs.floor_mib=32 \
        --jobs="$(nproc)" --raw_output=kunit 'virtio_balloon_rs*'
"#;

/// Builds the module in the tree in which KUnit ran.
const BUILD_MODULE: &str = r#"
    scripts/config --file .kunit/.config --module VIRTIO_BALLOON_RS
    make O=.kunit olddefconfig
    make O=.kunit -j"$(nproc)" modules
"#;

/// Copies a kernel's source, unless an earlier run has done so.
fn copy_once(source: &Path, copy: &Path) -> Result<()> {
    if copy.exists() {
        return Ok(());
    }
    // An interrupted run has left a part.
    let new = copy.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    kernel::output(Command::new("cp").arg("--archive").arg(source).arg(&new))?;
    fs::rename(new, copy)?;
    Ok(())
}

/// Copies the driver into a copy of the kernel's source, and adds its KUnit results there.
///
/// # Errors
///
/// It cannot be copied, its sources or the patches violate the kernel's style, or it does not build.
pub(crate) fn run(places: &Places, accel: Accel, report: &Report) -> Result<()> {
    let source = kernel::source(places)?;
    let name = source.file_name().context("the source is a directory")?;
    let copy = places.cache.join("in-tree").join(name);
    fs::create_dir_all(copy.with_file_name(""))?;
    let _lock = kernel::lock(&copy)?;
    // A user's own source may have changed since, or be another one of that name.
    if copy.exists() && !source.starts_with(&places.cache) {
        fs::remove_dir_all(&copy)?;
    }
    copy_once(&source, &copy)?;
    place(&copy)?;
    let once = contents(&copy)?;
    place(&copy)?;
    ensure!(
        contents(&copy)? == once,
        "putting the driver into a kernel's source a second time changes it"
    );
    let log = |name: &str| places.build().join(format!("in-tree-{name}.log"));

    phase(
        "Writing the patches for the kernel",
        sh(PATCHES).arg(&source).arg(places.build().join("patches")),
        &log("patches"),
    )?;
    phase(
        "Checking the style in the tree",
        sh(CHECK_STYLE).arg(PLACE).current_dir(&copy),
        &log("checkpatch"),
    )?;
    let accel = if accel == Accel::Kvm { "kvm" } else { "tcg" };
    let kunit = [
        "--mount",
        "--propagation=unchanged",
        "sh",
        "-euc",
        KUNIT,
        "sh",
    ];
    phase(
        "Running KUnit in the tree",
        Command::new("unshare")
            .args(kunit)
            .args([accel, PLACE])
            .current_dir(&copy),
        &log("kunit"),
    )?;
    for Case { name, outcome } in ktap::parse(&fs::read_to_string(log("kunit"))?) {
        report.add(&format!("kunit {name} (in the tree)"), None, &outcome, &[]);
    }

    let module = copy.join(".kunit").join(PLACE).join("virtio-balloon-rs.ko");
    phase(
        "Building the module in the tree",
        sh(BUILD_MODULE).current_dir(&copy),
        &log("module"),
    )?;
    ensure!(module.exists(), "no module has been built in the tree");
    Ok(())
}

/// Runs a command, whose output is the progress of a phase.
fn phase(title: &str, command: &mut Command, log: &Path) -> Result<()> {
    let phase = Phase::start(title, None);
    phase.follow(command, log)?;
    phase.finish();
    Ok(())
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-euc", script, "sh"]);
    command
}

fn place(source: &Path) -> Result<()> {
    kernel::output(
        Command::new("make")
            .arg("in-tree")
            .arg(format!("KSRC={}", source.display())),
    )?;
    Ok(())
}

/// The files in the driver's directory, and next to it.
fn contents(source: &Path) -> Result<String> {
    kernel::output(sh("find drivers/virtio -type f | sort | xargs sha256sum").current_dir(source))
}
