// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The preparation of a guest.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::Result;
use vm::{Artifacts, Coverage, Driver, Kernel};

use crate::debian::Installed;
use crate::kernel::Tree;
use crate::places::Places;
use crate::platform::Platform;
use crate::{debian, foreign, initramfs, kernel, module};

/// Builds a kernel, the drivers for it and an initramfs, unless they exist.
pub(crate) fn prepare(places: &Places, kernel: Kernel) -> Result<Artifacts> {
    if kernel == Kernel::Debian {
        return Ok(install(places)?.0);
    }
    fs::create_dir_all(places.build_for(kernel))?;
    let (tree, module) = compile(places, kernel)?;
    let modules = modules(places, &tree, module)?;
    artifacts(places, kernel, tree.image(), &modules, None)
}

/// Builds the packages, and installs them in a system for guests with Debian's kernel.
pub(crate) fn install(places: &Places) -> Result<(Artifacts, Installed)> {
    let kernel = Kernel::Debian;
    let build = places.build_for(kernel);
    fs::create_dir_all(&build)?;
    let installed = debian::install(places, &build)?;
    let image = installed.image.clone();
    let artifacts = Artifacts {
        system: Some(installed.system()),
        ..artifacts(places, kernel, image, &installed.drivers, None)?
    };
    Ok((artifacts, installed))
}

/// Builds a kernel, and the module for it, unless they exist.
pub(crate) fn compile(places: &Places, kernel: Kernel) -> Result<(Tree, PathBuf)> {
    let rust = match kernel.foreign() {
        Some(architecture) => foreign::compiler(places, architecture)?,
        None => None,
    };
    let tree = kernel::build_with(places, kernel, rust)?;
    let module = module::build(places, &tree)?;
    Ok((tree, module))
}

/// The same for the driver in `module`, which has coverage counters.
pub(crate) fn counting(
    places: &Places,
    tree: &Tree,
    module: &Path,
    coverage: Coverage,
) -> Result<Artifacts> {
    let modules = modules(places, tree, module.to_owned())?;
    artifacts(places, tree.kernel, tree.image(), &modules, Some(coverage))
}

/// A module of the driver, and the other modules for the same kernel.
fn modules(places: &Places, tree: &Tree, module: PathBuf) -> Result<Vec<PathBuf>> {
    let c = tree.path.join("drivers/virtio").join(Driver::C.file());
    let mut modules = vec![module, c];
    // No scenario loads it in another kernel.
    if tree.kernel == Kernel::Test {
        modules.push(module::build_lying(places, tree)?);
    }
    Ok(modules)
}

fn artifacts(
    places: &Places,
    kernel: Kernel,
    image: PathBuf,
    modules: &[PathBuf],
    coverage: Option<Coverage>,
) -> Result<Artifacts> {
    // guest/lab has put them all there.
    let tools = env::current_exe()?.with_file_name("");
    let platform = match kernel.foreign() {
        None => Platform::of_build_root(&tools),
        Some(architecture) => foreign::prepare(places, architecture, &tools)?,
    };
    let initramfs = match coverage {
        None => "initramfs.cpio",
        Some(_) => "counting.cpio",
    };
    let initramfs = places.build_for(kernel).join(initramfs);
    initramfs::write(&initramfs, &platform.agent, &platform.shell, modules)?;
    let logs = places.logs().join(kernel.to_string());
    Ok(Artifacts {
        kernel,
        image,
        qemu: platform.qemu,
        initramfs,
        tools,
        logs,
        coverage,
        system: None,
    })
}
