// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the structure of the sources, the driver's and those of the host's programs.

mod cycles;
mod parity;
mod sizes;

use std::path::PathBuf;

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
