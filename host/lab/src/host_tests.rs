// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The unit tests of the host's own programs.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::{Result, ensure};
use regex::Regex;
use vm::ktap::Outcome;

use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::report::Report;

static RESULT: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^test (?P<name>.*?) \.\.\. (?P<result>ok|FAILED|ignored)").expect("it is valid")
});

/// Builds and runs them.
pub(crate) fn run(places: &Places, report: &Report) -> Result<()> {
    let cargo = || {
        let mut cargo = Command::new("cargo");
        cargo.args([
            "test",
            "--release",
            "--locked",
            "--workspace",
            "--no-fail-fast",
        ]);
        cargo.args(["--manifest-path", "host/Cargo.toml"]);
        cargo
    };
    // Cargo puts programs of all checkouts in one place, from where guest/lab takes what it has built.
    let _lock = kernel::lock(&places.cache.join("tools"))?;
    let phase = Phase::start("Building the host's tests", None);
    phase.follow(
        cargo().arg("--no-run"),
        &places.build().join("host-tests-build.log"),
    )?;
    phase.finish();

    let _running = report.begin("host");
    let log = places.build().join("host-tests.log");
    // Not a pipe: a process that a test has left would keep it open.
    let status = cargo()
        .stdin(Stdio::null())
        .stdout(File::create(&log)?)
        .stderr(Stdio::null())
        .status()?;
    let stdout = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let results = results(&stdout);
    let failed = results
        .iter()
        .any(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
    ensure!(
        status.success() || failed,
        "cargo test fails without a failed test; run it in host/ with guest/build-root"
    );
    for (name, outcome) in results {
        let outcome = match outcome {
            Outcome::Failed(_) => Outcome::Failed(format!("see {}", log.display())),
            other => other,
        };
        report.add(&format!("host {name}"), None, &outcome, &[]);
    }
    Ok(())
}

fn results(stdout: &str) -> Vec<(String, Outcome)> {
    stdout
        .lines()
        .filter_map(|line| {
            let found = RESULT.captures(line)?;
            let outcome = match &found["result"] {
                "ok" => Outcome::Passed,
                "FAILED" => Outcome::Failed(String::new()),
                _ => Outcome::Skipped("ignored".to_owned()),
            };
            Some((found["name"].to_owned(), outcome))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        let stdout = "running 4 tests\ntest a::b ... ok\n\
                      test src/lib.rs - (line 9) - compile ... ok\n\
                      test c ... FAILED\ntest d ... ignored, slow\n\
                      test result: FAILED. 2 passed";
        let outcomes: Vec<_> = results(stdout)
            .into_iter()
            .map(|(_, outcome)| outcome)
            .collect();
        assert_eq!(
            outcomes,
            [
                Outcome::Passed,
                Outcome::Passed,
                Outcome::Failed(String::new()),
                Outcome::Skipped("ignored".to_owned())
            ]
        );
    }
}
