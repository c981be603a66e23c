// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! docs/parity.md names a test for each line, and each of these exists.

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

/// Checks the last cell of a line: names in backticks, of scenarios, or of KUnit cases and suites behind "KUnit:".
fn check(cell: &str, kunit: &str) -> Result<()> {
    let mut pieces = cell.split('`');
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
fn each_line_of_parity_has_a_test() -> Result<()> {
    let text = fs::read_to_string(checkout().join("docs/parity.md"))?;
    let kunit = kunit()?;
    let lines = text
        .lines()
        .skip_while(|line| !line.starts_with("|---"))
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    let mut checked = 0;
    for line in lines {
        let cell = line.trim_end_matches('|').rsplit('|').next();
        check(cell.unwrap_or_default(), &kunit).with_context(|| line.to_owned())?;
        checked += 1;
    }
    ensure!(checked > 0, "docs/parity.md has no table");
    Ok(())
}
