// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results of tests: a line for each, and how many there were.

use std::io::{IsTerminal, stderr};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vm::ktap::Outcome;

use crate::progress::{BARS, LOG_INTERVAL};

/// How many of the slowest tests are listed at the end.
const SLOWEST: usize = 10;

/// Counts results and prints them at once, from several threads.
pub(crate) struct Report {
    state: Arc<Mutex<State>>,
    bar: ProgressBar,
    start: Instant,
}

#[derive(Default)]
struct State {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
    /// The running tests, and when they began.
    running: Vec<(String, Instant)>,
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
        let state = Arc::default();
        if !stderr().is_terminal() {
            let state = Arc::downgrade(&state);
            thread::spawn(move || print_running(&state));
        }
        Self {
            state,
            bar,
            start: Instant::now(),
        }
    }

    /// Shows a running test. If standard error is not a terminal, a line every 30 s does that.
    pub(crate) fn begin(&self, name: &str) -> Running<'_> {
        let mut state = self.state();
        let start = Instant::now();
        state.running.push((name.to_owned(), start));
        self.show(&state);
        Running {
            report: self,
            name: name.to_owned(),
            start,
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
        let names: Vec<_> = state
            .running
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        self.bar.set_message(names.join("; "));
    }
}

/// Prints the running tests now and then, until the report is gone.
fn print_running(state: &Weak<Mutex<State>>) {
    loop {
        thread::sleep(LOG_INTERVAL);
        let Some(state) = state.upgrade() else {
            return;
        };
        let line = state.lock().expect("a lock").running_line();
        if let Some(line) = line {
            eprintln!("{line}");
        }
    }
}

impl State {
    /// The running tests, and for how long they have run, if there are any.
    fn running_line(&self) -> Option<String> {
        let tests: Vec<_> = self
            .running
            .iter()
            .map(|(name, start)| format!("{name} for {} s", start.elapsed().as_secs()))
            .collect();
        (!tests.is_empty()).then(|| format!("running: {}", tests.join("; ")))
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
        let place = state
            .running
            .iter()
            .position(|(name, _)| *name == self.name);
        place.map(|place| state.running.remove(place));
        self.report.show(&state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_tests_are_named() {
        let report = Report::new();
        assert_eq!(report.state().running_line(), None);
        let _first = report.begin("first");
        let second = report.begin("second");
        let line = report.state().running_line().unwrap();
        assert!(
            line.contains("first for ") && line.contains("; second for "),
            "{line}"
        );
        drop(second);
        let line = report.state().running_line().unwrap();
        assert!(!line.contains("second"), "{line}");
    }
}
