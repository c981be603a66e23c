// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the structure of the sources, the driver's and those of the host's programs.

mod cycles;
mod documents;
mod driver;
mod locks;
mod parity;
mod sizes;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use syn::Attribute;

fn checkout() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Whether an item belongs to the unit tests of its file.
fn is_test(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| {
        let argument = attr.parse_args::<syn::Path>();
        attr.path().is_ident("cfg") && argument.is_ok_and(|path| path.is_ident("test"))
    })
}

/// Adds the Rust files in a folder, without build results.
fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') || ["build", "target"].contains(&&*name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if name.ends_with(".rs") {
            files.push(entry.path());
        }
    }
    Ok(())
}
