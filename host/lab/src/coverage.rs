// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The coverage of the module by KUnit and by the scenarios.

use std::collections::BTreeMap;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use scenarios::SCENARIOS;
use serde_json::Value;
use vm::{Artifacts, Coverage, Driver, Kernel};

use crate::cli::Guests;
use crate::places::Places;
use crate::report::Report;
use crate::{kernel, kunit, module, setup, test};

/// The parts of the module that exist only for tests.
const FOR_TESTS: [&str; 2] = ["tests", "rust/virtio/fake_device.rs"];

/// The tests that execute the lines.
const PARTS: [&str; 2] = ["kunit", "scenarios"];

/// Runs KUnit and the short scenarios in the test kernel, or some of them, and prints their
/// coverage together with that of earlier runs. Returns whether all tests passed.
pub(crate) fn run(only: Option<&str>, guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let directory = places.build().join("coverage");
    let tree = kernel::build(&places, Kernel::Test)?;
    let module = module::build_counting(&places, &tree)?;
    // Counts of another module are useless.
    let directory = directory.join(module::key(&places)?);
    if only.is_none() && directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    let [with_kunit, with_scenarios] = PARTS.map(|part| -> Result<Artifacts> {
        let coverage = Coverage::new(&module, &directory.join(part))?;
        setup::counting(&places, &tree, &module, coverage)
    });

    let report = Report::new();
    if only.is_none_or(|only| only == "kunit") {
        kunit::run_in(Kernel::Test, &with_kunit?, guests, &report);
    }
    let artifacts = with_scenarios?;
    for scenario in SCENARIOS.iter().copied().flatten() {
        let wanted = only.map_or(!test::takes_long(scenario), |only| {
            scenario.name.contains(only)
        });
        let possible =
            scenario.kernels.contains(&Kernel::Test) && scenario.drivers.contains(&Driver::Rust);
        if !wanted || !possible {
            continue;
        }
        for &device in test::devices_of(scenario) {
            let variant = (Kernel::Test, Driver::Rust, device, false);
            test::run_scenario(scenario, variant, &artifacts, guests, &report);
        }
    }
    let good = report.conclude();

    let [kunit, scenarios] = PARTS.map(|part| directory.join(part));
    let columns = [
        executed(&places, &module, &[&kunit])?,
        executed(&places, &module, &[&scenarios])?,
        executed(&places, &module, &[&kunit, &scenarios])?,
    ];
    println!("{}", table(&columns));
    Ok(good)
}

/// How many lines a file has, and how many of them were executed.
#[derive(Clone, Copy, Default)]
struct Lines {
    all: u64,
    executed: u64,
}

/// The coverage of each of the module's files, from all counts in these directories.
fn executed(
    places: &Places,
    module: &Path,
    directories: &[&PathBuf],
) -> Result<BTreeMap<String, Lines>> {
    let mut counts = Vec::new();
    for directory in directories {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "profraw")
            {
                counts.push(path);
            }
        }
    }
    if counts.is_empty() {
        return Ok(BTreeMap::new());
    }
    let merged = places.build().join("coverage/merged.profdata");
    let status = Command::new("llvm-profdata")
        .args(["merge", "--sparse", "-o"])
        .arg(&merged)
        .args(&counts)
        .status()?;
    ensure!(status.success(), "llvm-profdata does not accept the counts");
    let output = Command::new("llvm-cov")
        .args(["export", "--summary-only", "--instr-profile"])
        .arg(&merged)
        .arg(module)
        .output()?;
    ensure!(
        output.status.success(),
        "llvm-cov fails: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let export: Value = serde_json::from_slice(&output.stdout)?;
    let files = export["data"][0]["files"].as_array().context("files")?;
    let mut lines = BTreeMap::new();
    for file in files {
        let path = Path::new(file["filename"].as_str().context("a name")?);
        let Ok(path) = path.strip_prefix(&places.checkout) else {
            // It belongs to the `kernel` crate.
            continue;
        };
        if FOR_TESTS.iter().any(|tests| path.starts_with(tests)) || path.starts_with("build") {
            continue;
        }
        let number = |name: &str| file["summary"]["lines"][name].as_u64().context("a number");
        lines.insert(
            path.display().to_string(),
            Lines {
                all: number("count")?,
                executed: number("covered")?,
            },
        );
    }
    Ok(lines)
}

/// A row for each file, and one for all of them.
fn table(columns: &[BTreeMap<String, Lines>; 3]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(ASCII_MARKDOWN)
        .set_header(["file", "lines", "KUnit", "scenarios", "both"]);
    let mut row = |name: &str, lines: [Lines; 3]| {
        // Empty if no test was run.
        let percent = |lines: Lines| {
            let percent = (lines.executed * 100).checked_div(lines.all);
            percent.map_or_else(String::new, |percent| format!("{percent} %"))
        };
        let all = iter::once(lines[2].all.to_string());
        table.add_row(
            iter::once(name.to_owned())
                .chain(all)
                .chain(lines.map(percent)),
        );
    };
    let mut sums = [Lines::default(); 3];
    for name in columns[2].keys() {
        let lines = [0, 1, 2].map(|column| columns[column].get(name).copied().unwrap_or_default());
        for (sum, lines) in sums.iter_mut().zip(lines) {
            sum.all += lines.all;
            sum.executed += lines.executed;
        }
        row(name, lines);
    }
    row("all", sums);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
