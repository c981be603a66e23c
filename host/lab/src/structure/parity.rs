// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! docs/parity.md has a footnote for each difference, which names tests, and each of these exists.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use benchmarks::BENCHMARKS;
use scenarios::SCENARIOS;

use super::checkout;

/// The source of all KUnit cases.
fn kunit() -> Result<String> {
    let mut sources = String::new();
    for entry in fs::read_dir(checkout().join("tests/kunit"))? {
        sources += &fs::read_to_string(entry?.path())?;
    }
    Ok(sources)
}

/// Checks a footnote: names in backticks, of scenarios, or of KUnit cases and suites behind "KUnit:".
fn check(footnote: &str, kunit: &str) -> Result<()> {
    let mut pieces = footnote.split('`');
    let mut names = 0;
    let mut is_kunit = false;
    while let (Some(before), Some(name)) = (pieces.next(), pieces.next()) {
        names += 1;
        is_kunit |= before.contains("KUnit:");
        let exists = if is_kunit {
            kunit.contains(&format!("fn {name}("))
                || kunit.contains(&format!("kunit_tests({name})"))
        } else if let Some(only) = name.strip_prefix("make bench ONLY=") {
            BENCHMARKS
                .iter()
                .any(|benchmark| benchmark.names.iter().any(|name| name.contains(only)))
        } else {
            name.starts_with("make test ")
                || SCENARIOS
                    .iter()
                    .copied()
                    .flatten()
                    .any(|scenario| scenario.name == name)
        };
        ensure!(exists, "there is no test {name}");
    }
    ensure!(names > 0, "no test is named");
    Ok(())
}

#[test]
fn each_difference_has_a_test() -> Result<()> {
    let text = fs::read_to_string(checkout().join("docs/parity.md"))?;
    let kunit = kunit()?;
    let footnotes: HashMap<_, _> = text
        .split("\n[^")
        .skip(1)
        .filter_map(|note| note.split("\n\n").next()?.split_once("]: "))
        .collect();
    let rows: Vec<_> = text
        .split("| this driver | test |\n")
        .skip(1)
        .flat_map(|table| {
            table
                .lines()
                .skip(1)
                .take_while(|line| line.starts_with('|'))
        })
        .collect();
    ensure!(!rows.is_empty(), "docs/parity.md has no table");
    ensure!(rows.len() == footnotes.len(), "a footnote has no row");
    for row in rows {
        row.rsplit_once("| [^")
            .and_then(|(_, label)| footnotes.get(label.strip_suffix("] |")?))
            .context("there is no footnote")
            .and_then(|footnote| check(footnote, &kunit))
            .with_context(|| row.to_owned())?;
    }
    Ok(())
}
