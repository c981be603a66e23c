// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results of tests: a line for each, and how many there were.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vm::ktap::Outcome;

/// Counts results and prints them as they come.
pub(crate) struct Report {
    passed: usize,
    failed: usize,
    skipped: usize,
    bar: ProgressBar,
}

impl Report {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}");
        bar.set_style(style.expect("the template is valid"));
        Self {
            passed: 0,
            failed: 0,
            skipped: 0,
            bar,
        }
    }

    /// Shows, on a terminal, that a test runs.
    pub(crate) fn begin(&self, name: &str) -> Instant {
        self.bar.set_message(name.to_owned());
        self.bar.reset_elapsed();
        if stderr().is_terminal() {
            self.bar.enable_steady_tick(Duration::from_millis(100));
        }
        Instant::now()
    }

    /// Takes in a result; `took` is not known of tests that run in one program with others.
    pub(crate) fn add(&mut self, name: &str, took: Option<Duration>, outcome: &Outcome) {
        let (count, word, reason) = match outcome {
            Outcome::Passed => (&mut self.passed, "ok", ""),
            Outcome::Failed(reason) => (&mut self.failed, "FAILED", reason.as_str()),
            Outcome::Skipped(reason) => (&mut self.skipped, "skipped", reason.as_str()),
        };
        *count += 1;
        let took = took
            .map(|took| format!("{:6.1} s", took.as_secs_f64()))
            .unwrap_or_default();
        self.print(&format!("{word:8}{name:70}{took}"));
        for line in reason.lines() {
            self.print(&format!("        {line}"));
        }
    }

    /// Prints a line without disturbing what the terminal shows.
    pub(crate) fn print(&self, line: &str) {
        self.bar.suspend(|| println!("{}", line.trim_end()));
    }

    /// Prints the totals, and says whether all is well.
    pub(crate) fn conclude(self) -> bool {
        self.bar.finish_and_clear();
        let skipped = match self.skipped {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        println!("{} passed, {} failed{skipped}", self.passed, self.failed);
        self.failed == 0 && self.passed > 0
    }
}
