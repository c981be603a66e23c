// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The form of the documents.

use std::fs;

use anyhow::Result;

use super::checkout;

/// The folders with documents in the checkout.
const FOLDERS: [&str; 3] = ["", "docs", "host/lab/src/bench"];

/// Not checked: `make bench-docs` writes it, with the machine in a line.
const GENERATED: &str = "performance.md";

/// The columns of a line outside tables and code blocks.
const COLUMNS: usize = 120;

/// The numbers of the lines that are too long.
fn too_long(text: &str) -> Vec<usize> {
    let mut is_code = false;
    let lines = text.lines().zip(1..).filter(|(line, _)| {
        is_code ^= line.trim_start().starts_with("```");
        !is_code && !line.starts_with('|') && line.chars().count() > COLUMNS
    });
    lines.map(|(_, number)| number).collect()
}

#[test]
fn lines_of_documents_fit_into_120_columns() -> Result<()> {
    let mut checked = 0;
    for folder in FOLDERS {
        for entry in fs::read_dir(checkout().join(folder))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.ends_with(".md") || name == GENERATED {
                continue;
            }
            let text = fs::read_to_string(checkout().join(folder).join(&name))?;
            let found = too_long(&text);
            assert!(found.is_empty(), "{name}, lines {found:?}: too long");
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} documents");
    Ok(())
}

#[test]
fn a_long_line_of_a_document_is_found() {
    let long = "a ".repeat(COLUMNS);
    let text = format!("| {long} |\n```sh\n{long}\n```\n{long}\nshort\n");
    assert_eq!(too_long(&text), vec![5]);
}
