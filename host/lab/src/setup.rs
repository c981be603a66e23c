// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that must be there before a guest can boot.

use std::{env, fs};

use anyhow::Result;
use vm::{Artifacts, Driver, Kernel};

use crate::places::Places;
use crate::{debian, initramfs, kernel, module};

/// Builds a kernel, the drivers for it and an initramfs, as far as that has not been done.
pub(crate) fn prepare(places: &Places, kernel: Kernel) -> Result<Artifacts> {
    let build = places.build_for(kernel);
    fs::create_dir_all(&build)?;
    let (image, modules) = match kernel {
        Kernel::Test | Kernel::Debug | Kernel::Kcsan => {
            let tree = kernel::build(places, kernel)?;
            let modules = vec![
                module::build(places, &tree)?,
                module::build_lying(places, &tree)?,
                tree.path.join("drivers/virtio").join(Driver::C.file()),
            ];
            (tree.image(), modules)
        }
        Kernel::Debian => debian::install(places, &build)?,
    };
    // guest/lab has put them all there.
    let tools = env::current_exe()?.with_file_name("");
    let agent = tools.join("agent");
    let initramfs = build.join("initramfs.cpio");
    initramfs::write(&initramfs, &agent, &modules)?;
    let logs = places.logs().join(kernel.to_string());
    Ok(Artifacts {
        kernel: image,
        initramfs,
        tools,
        logs,
    })
}
