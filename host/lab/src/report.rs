// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results of tests: a line for each, and how many there were.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vm::ktap::Outcome;

use crate::progress::BARS;

/// How many of the slowest tests are listed at the end.
const SLOWEST: usize = 10;

/// Counts results and prints them at once, from several threads.
pub(crate) struct Report {
    state: Mutex<State>,
    bar: ProgressBar,
    start: Instant,
}

#[derive(Default)]
struct State {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
    /// The running tests.
    running: Vec<String>,
    /// The completed tests, and how long they took.
    times: Vec<(Duration, String)>,
}

/// A running test.
pub(crate) struct Running<'a> {
    report: &'a Report,
    name: String,
    start: Instant,
}

impl Report {
    pub(crate) fn new() -> Self {
        let bar = BARS.add(ProgressBar::new_spinner());
        let style = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}");
        bar.set_style(style.expect("the template is valid"));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self {
            state: Mutex::default(),
            bar,
            start: Instant::now(),
        }
    }

    /// Shows a running test on a terminal.
    pub(crate) fn begin(&self, name: &str) -> Running<'_> {
        let mut state = self.state();
        state.running.push(name.to_owned());
        self.show(&state);
        Running {
            report: self,
            name: name.to_owned(),
            start: Instant::now(),
        }
    }

    /// Adds a result, with lines to print below it. The duration of tests that share a program is unknown.
    pub(crate) fn add(
        &self,
        name: &str,
        took: Option<Duration>,
        outcome: &Outcome,
        notes: &[String],
    ) {
        let mut state = self.state();
        let (word, reason) = match outcome {
            Outcome::Passed => ("ok", ""),
            Outcome::Failed(reason) => ("FAILED", reason.as_str()),
            Outcome::Skipped(reason) => ("skipped", reason.as_str()),
        };
        match outcome {
            Outcome::Passed => state.passed += 1,
            Outcome::Failed(_) => state.failed.push(name.to_owned()),
            Outcome::Skipped(_) => state.skipped += 1,
        }
        let seconds = took
            .map(|took| format!("{:6.1} s", took.as_secs_f64()))
            .unwrap_or_default();
        let mut lines = format!("{word:8}{name:70}{seconds}").trim_end().to_owned();
        for line in reason.lines().chain(notes.iter().map(String::as_str)) {
            lines += &format!("\n        {line}");
        }
        state.times.extend(took.map(|took| (took, name.to_owned())));
        BARS.suspend(|| println!("{lines}"));
    }

    /// Prints the slowest tests, the failed tests and the totals, and returns whether all passed.
    pub(crate) fn conclude(&self) -> bool {
        self.bar.finish_and_clear();
        let mut state = self.state();
        let took = self.start.elapsed();
        state
            .times
            .sort_by_key(|(took, _)| std::cmp::Reverse(*took));
        if state.times.len() > SLOWEST {
            println!(
                "the slowest {SLOWEST} of {} that ran by themselves:",
                state.times.len()
            );
            for (took, name) in &state.times[..SLOWEST] {
                println!("        {name:70}{:6.1} s", took.as_secs_f64());
            }
        }
        for name in &state.failed {
            println!("FAILED  {name}");
        }
        println!(
            "all took {} min {} s",
            took.as_secs() / 60,
            took.as_secs() % 60
        );
        if state.passed + state.skipped + state.failed.len() == 0 {
            println!(
                "no test was selected; make help describes ONLY=, KERNEL=, DRIVER= and DEVICE="
            );
        }
        let skipped = match state.skipped {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        println!(
            "{} passed, {} failed{skipped}",
            state.passed,
            state.failed.len()
        );
        state.failed.is_empty() && state.passed > 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a lock")
    }

    fn show(&self, state: &State) {
        self.bar.set_message(state.running.join("; "));
    }
}

impl Running<'_> {
    /// Its duration so far.
    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Ends it with a result.
    pub(crate) fn end(self, outcome: &Outcome, notes: &[String]) {
        self.report
            .add(&self.name, Some(self.elapsed()), outcome, notes);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.report.state();
        let place = state.running.iter().position(|name| *name == self.name);
        place.map(|place| state.running.remove(place));
        self.report.show(&state);
    }
}
