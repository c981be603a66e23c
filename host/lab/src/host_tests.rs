// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The unit tests of the host's own programs. Their fuzz targets, which only `make test-long` runs, are compiled.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use regex::Regex;
use vm::ktap::Outcome;

use crate::descendants::Descendants;
use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::report::Report;

static RESULT: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^test (?P<name>.*?) \.\.\. (?P<result>ok|FAILED|ignored)").expect("it is valid")
});

static SLOW: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^test (?P<name>.*) has been running for over").expect("it is valid")
});

/// How long the tests may run without a result of one of them, unless they use processors.
const QUIET_LIMIT: Duration = Duration::from_secs(600);

/// The share of the limit for which tests that work use processors at least. Daemons that wait use less.
const SHARE: u32 = 60;

const POLL_INTERVAL: Duration = Duration::from_millis(200);

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
    // Cargo puts programs of all checkouts into one directory, from which guest/lab copies those
    // that it has built.
    let _lock = kernel::lock(&places.cache.join("tools"))?;
    let phase = Phase::start("Building the host's tests", None);
    phase.follow(
        cargo().arg("--no-run"),
        &places.build().join("host-tests-build.log"),
    )?;
    phase.finish();

    let _running = report.begin("host");
    let log = places.build().join("host-tests.log");
    let errors = places.build().join("host-tests-errors.log");
    // Not a pipe: a process that remains from a test would keep it open.
    let mut child = cargo()
        .stdin(Stdio::null())
        .stdout(File::create(&log)?)
        .stderr(File::create(&errors)?)
        .spawn()?;
    let status = wait_printing(&mut child, &log, QUIET_LIMIT)?;
    let stdout = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let results = results(&stdout);
    let failed = results
        .iter()
        .any(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
    ensure!(
        status.success() || failed,
        "cargo test fails without a failed test; {} has its errors",
        errors.display()
    );
    for (name, outcome) in results {
        let outcome = match outcome {
            Outcome::Failed(_) => Outcome::Failed(format!("see {}", log.display())),
            other => other,
        };
        report.add(&format!("host {name}"), None, &outcome, &[]);
    }
    check_fuzz_targets(places)
}

/// Compiles the fuzz targets, which are no members of the workspace, without their instrumentation.
fn check_fuzz_targets(places: &Places) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["check", "--release", "--locked"]);
    cargo.args(["--manifest-path", "host/fuzz/Cargo.toml"]);
    let phase = Phase::start("Checking the fuzz targets", None);
    phase.follow(&mut cargo, &places.build().join("fuzz-check.log"))?;
    phase.finish();
    Ok(())
}

/// Waits for the end of a command that prints to `log`.
///
/// # Errors
///
/// It has printed nothing and hardly used a processor for the time `limit`, and was killed.
fn wait_printing(child: &mut Child, log: &Path, limit: Duration) -> Result<ExitStatus> {
    let (mut printed, mut before, mut since) = (0, Duration::ZERO, Instant::now());
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let now = fs::metadata(log)?.len();
        if now != printed || since.elapsed() > limit {
            let descendants = Descendants::of(child.id());
            let used = descendants.processor_time();
            let works = descendants.is_runnable() || used.saturating_sub(before) > limit / SHARE;
            if now == printed && !works {
                descendants.kill();
                child.wait()?;
                bail!(
                    "the tests printed nothing and hardly used a processor for {} s, and were killed; {} has those \
                     that were running: {}",
                    limit.as_secs(),
                    log.display(),
                    unfinished(&fs::read_to_string(log)?).join(", ")
                );
            }
            (printed, before, since) = (now, used, Instant::now());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// The long-running tests without a result.
fn unfinished(stdout: &str) -> Vec<String> {
    let ended = results(stdout);
    stdout
        .lines()
        .filter_map(|line| {
            let name = SLOW.captures(line)?["name"].to_owned();
            ended
                .iter()
                .all(|(other, _)| *other != name)
                .then_some(name)
        })
        .collect()
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
    fn tests_that_hang_are_killed_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let run = |script: &str, limit: u64| {
            let log = directory.path().join(limit.to_string());
            let mut child = Command::new("sh")
                .args(["-c", script])
                .stdout(File::create(&log).unwrap())
                .spawn()
                .unwrap();
            wait_printing(&mut child, &log, Duration::from_secs(limit))
        };
        // Both take longer than the limit. One prints, also on a busy machine, and one uses a processor.
        thread::scope(|scope| {
            let prints = "for i in $(seq 24); do echo; sleep 0.5; done";
            let prints = scope.spawn(|| run(prints, 10));
            let works = "end=$(($(date +%s) + 5)); while [ $(date +%s) -lt $end ]; do :; done";
            assert!(run(works, 2).unwrap().success());
            assert!(prints.join().unwrap().unwrap().success());
        });
        let slow = "has been running for over 60 seconds";
        let script = format!(
            "echo 'test a {slow}'; echo 'test b {slow}'; echo 'test a ... ok'; while :; do sleep 1; done"
        );
        let error = run(&script, 2).unwrap_err().to_string();
        assert!(error.ends_with("running: b"), "{error}");
    }

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
