// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests' initramfs: the agent as init, a shell with its tools, and the modules.

use std::fs::{self, File};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::Builder;
use cpio::write_cpio;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Writes an initramfs with these modules in its /modules. The shell is a busybox.
pub(crate) fn write(path: &Path, agent: &Path, shell: &Path, modules: &[PathBuf]) -> Result<()> {
    let mut entries = Vec::new();
    let mut add = |name: String, mode: u32, contents: Vec<u8>| {
        let number = u32::try_from(entries.len()).expect("there are a handful of them");
        entries.push((
            Builder::new(&name).ino(number).mode(mode),
            Cursor::new(contents),
        ));
    };
    for directory in ["bin", "dev", "modules"] {
        add(directory.to_owned(), DIRECTORY, Vec::new());
    }
    let read = |path: &Path| {
        fs::read(path).with_context(|| format!("reading {} for the guest", path.display()))
    };
    add("init".to_owned(), PROGRAM, read(agent)?);
    add("bin/busybox".to_owned(), PROGRAM, read(shell)?);
    for module in modules {
        let name = module
            .file_name()
            .context("a module has a name")?
            .to_string_lossy();
        add(format!("modules/{name}"), PROGRAM, read(module)?);
    }
    // A guest that boots at this moment gets the old one or the new one, not a part of it.
    let new = path.with_extension("new");
    write_cpio(entries.into_iter(), File::create(&new)?)?;
    fs::rename(new, path)?;
    Ok(())
}
