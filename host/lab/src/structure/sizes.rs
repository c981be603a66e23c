// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits the length of files and functions. Unit tests do not count.

use std::fs;

use anyhow::{Context, Result};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Block, ImplItemFn, ItemFn, ItemMod, Signature, TraitItemFn};

use super::{checkout, find, is_test};

/// Lines of a file, without its unit tests.
const MAX_FILE: usize = 500;
/// Lines of the driver's root, which only connects its parts.
const ROOT: &str = "virtio_balloon_rs.rs";
const MAX_ROOT: usize = 120;
/// Lines of a function, from its name on.
const MAX_FUNCTION: usize = 60;

/// Files with unit tests and their helpers only: parts of their paths in the checkout.
const TESTS: &[&str] = &["/tests/", "/tests.rs", "tests/kunit/", "/fake_device.rs"];

/// Counts the lines of a file.
#[derive(Default)]
struct Lines {
    /// Those of unit tests.
    tests: usize,
    functions: Vec<(String, usize)>,
}

fn lines(first: &impl Spanned, last: &impl Spanned) -> usize {
    last.span().end().line - first.span().start().line + 1
}

impl Lines {
    fn add(&mut self, signature: &Signature, body: &Block) {
        self.functions
            .push((signature.ident.to_string(), lines(signature, body)));
    }
}

impl<'a> Visit<'a> for Lines {
    fn visit_item_fn(&mut self, item: &'a ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'a ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'a TraitItemFn) {
        if let Some(body) = &item.default {
            self.add(&item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if is_test(&item.attrs) {
            self.tests += lines(item, item);
            return;
        }
        visit::visit_item_mod(self, item);
    }
}

/// The items that are too long in the file with this path in the checkout.
fn too_long(path: &str, text: &str) -> Result<Vec<String>> {
    if TESTS.iter().any(|part| path.contains(part)) {
        return Ok(Vec::new());
    }
    let mut counted = Lines::default();
    counted.visit_file(&syn::parse_file(text).with_context(|| path.to_owned())?);
    let lines = text.lines().count() - counted.tests;
    let most = if path == ROOT { MAX_ROOT } else { MAX_FILE };
    let file = (lines > most)
        .then(|| format!("{path}: {lines} lines without unit tests, more than {most}"));
    let functions = counted
        .functions
        .into_iter()
        .filter(|&(_, lines)| lines > MAX_FUNCTION);
    let functions = functions.map(|(name, lines)| {
        format!("{path}: {name}() has {lines} lines, more than {MAX_FUNCTION}")
    });
    Ok(file.into_iter().chain(functions).collect())
}

#[test]
fn nothing_is_too_long() {
    let mut files = Vec::new();
    find(&checkout(), &mut files).unwrap();
    let found: Vec<_> = files
        .iter()
        .flat_map(|file| {
            let path = file.strip_prefix(checkout()).unwrap().to_str().unwrap();
            too_long(path, &fs::read_to_string(file).unwrap()).unwrap()
        })
        .collect();
    assert!(
        found.is_empty(),
        "cut along what they do:\n{}",
        found.join("\n")
    );
    assert!(files.iter().any(|file| file.ends_with(ROOT)));
    assert!(files.iter().any(|file| file.ends_with(file!())));
}

#[test]
fn the_readme_has_at_most_200_lines() {
    let lines = include_str!("../../../../README.md").lines().count();
    assert!(lines <= 200, "README.md has {lines} lines");
}

#[test]
fn what_is_too_long_is_found() {
    let function =
        |lines: usize| format!("/// Docs.\nfn f() {{\n{}}}\n", "g();\n".repeat(lines - 2));
    let tests = format!(
        "#[cfg(test)]\nmod tests {{\n{}}}\n",
        "// A comment.\n".repeat(MAX_FILE)
    );
    let long_file = "const A: u8 = 0;\n".repeat(MAX_FILE);

    let check = |path: &str, text: &str| too_long(path, text).unwrap();
    assert!(check("a.rs", &(function(MAX_FUNCTION) + &tests)).is_empty());
    assert_eq!(
        check("a.rs", &function(MAX_FUNCTION + 1)),
        ["a.rs: f() has 61 lines, more than 60"]
    );
    assert!(check("a.rs", &long_file).is_empty());
    let too_long_file = long_file + "const B: u8 = 0;\n" + &tests;
    assert_eq!(
        check("a.rs", &too_long_file),
        ["a.rs: 501 lines without unit tests, more than 500"]
    );
    let root = "const A: u8 = 0;\n".repeat(MAX_ROOT);
    assert!(check(ROOT, &root).is_empty());
    assert_eq!(check(ROOT, &(root + "const B: u8 = 0;\n")).len(), 1);
    assert!(check("host/a/tests/a.rs", &too_long_file).is_empty());
    assert_eq!(check("tests/vm/src/a.rs", &too_long_file).len(), 1);
}
