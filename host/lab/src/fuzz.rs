// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fuzzing of the input from guests, front ends and clients.
//!
//! The targets in host/fuzz have the layout of cargo-fuzz, which needs a nightly compiler for the
//! sanitizers. Without sanitizers any compiler works, with the flags that record coverage.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use vm::ktap::Outcome;

use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::report::Report;

const CRATE: &str = "host/fuzz";

/// With an explicit target, the flags apply to the fuzz targets and not to build scripts.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The flags of cargo-fuzz for coverage.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// How long an input may take, in seconds.
const TIMEOUT: u32 = 10;

/// Fuzzes one target or all of them, each for so many seconds. Returns whether all passed.
pub(crate) fn run(target: Option<&str>, seconds: u32) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let report = Report::new();
    fuzz(&places, target, seconds, &report)?;
    Ok(report.conclude())
}

/// The same, and reports a line for each target.
pub(crate) fn fuzz(
    places: &Places,
    only: Option<&str>,
    seconds: u32,
    report: &Report,
) -> Result<()> {
    let all = targets(&places.checkout.join(CRATE))?;
    let targets: Vec<_> = all
        .iter()
        .filter(|name| only.is_none_or(|only| only == *name))
        .collect();
    ensure!(
        !targets.is_empty(),
        "there is no such target; choose one of {}",
        all.join(", ")
    );
    let directory = places.build().join("fuzz");
    fs::create_dir_all(&directory)?;
    // All checkouts share objects, but not programs.
    let objects = places.cache.join("fuzz");
    let lock = kernel::lock(&objects)?;
    let phase = Phase::start("Building the fuzz targets", None);
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "--locked", "--target", TRIPLE])
        .arg("--manifest-path")
        .arg(places.checkout.join(CRATE).join("Cargo.toml"))
        .env("CARGO_TARGET_DIR", &objects)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    phase.follow(&mut cargo, &directory.join("build.log"))?;
    phase.finish();

    let built = objects.join(TRIPLE).join("release");
    let programs = directory.join("bin");
    fs::create_dir_all(&programs)?;
    for name in &all {
        fs::copy(built.join(name), programs.join(name))?;
    }
    drop(lock);
    for name in targets {
        let label = format!("fuzz {name}");
        let running = report.begin(&label);
        let outcome = fuzz_target(places, &directory, &programs, name, seconds)?;
        running.end(&outcome, &[]);
    }
    Ok(())
}

/// The names of the targets.
fn targets(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory.join("fuzz_targets"))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        names.push(name.context("a name that is no text")?.to_owned());
    }
    names.sort();
    Ok(names)
}

fn fuzz_target(
    places: &Places,
    directory: &Path,
    programs: &Path,
    name: &str,
    seconds: u32,
) -> Result<Outcome> {
    // libFuzzer writes new inputs to the first directory, and the next run starts from them.
    let found = directory.join("corpus").join(name);
    fs::create_dir_all(&found)?;
    let log = directory.join(format!("{name}.log"));
    let output = File::create(&log)?;
    let status = Command::new(programs.join(name))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg(format!(
            "-artifact_prefix={}/{name}-",
            directory.to_string_lossy()
        ))
        .arg(found)
        .arg(places.checkout.join(CRATE).join("corpus").join(name))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()?;
    if status.success() {
        return Ok(Outcome::Passed);
    }
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    Ok(Outcome::Failed(format!(
        "{}see {}",
        reason(&text),
        log.display()
    )))
}

/// The report of a failed input: the panic, and the path of the input.
fn reason(log: &str) -> String {
    let panic = log
        .lines()
        .skip_while(|line| !line.contains("panicked at"))
        .take(2);
    let input = log.lines().filter(|line| line.contains("written to"));
    panic.chain(input).flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_its_reason() {
        let log = "#2 INITED\nthread 'main' panicked at src/lib.rs:1:2:\npage 3 is torn\nnote: it is so\n\
                   Test unit written to build/fuzz/inflate-crash-1\n";
        assert_eq!(
            reason(log).lines().collect::<Vec<_>>(),
            [
                "thread 'main' panicked at src/lib.rs:1:2:",
                "page 3 is torn",
                "Test unit written to build/fuzz/inflate-crash-1"
            ]
        );
        assert_eq!(reason("ALARM"), "");
    }
}
