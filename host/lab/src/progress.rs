// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Progress bars. If standard error is not a terminal, each phase prints a line at its start, one
//! every 30 s with the progress, and one at the end with the time.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Write as _, stderr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::descendants::Descendants;

/// All bars of the terminal.
pub(crate) static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

const TICK: Duration = Duration::from_millis(100);

/// How often the progress of a phase and the running tests are printed if standard error is not a terminal.
pub(crate) const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// How often the progress of a command is checked.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// A command is killed when for so long it has printed nothing, used no CPU time, and did not wait for a processor.
const STALL_LIMIT: Duration = Duration::from_secs(300);

/// Which part of a phase, in percent, says how long the rest takes. A kernel's build begins with its longest steps.
const FIRST_PART: u64 = 10;

/// A phase.
pub(crate) struct Phase {
    name: String,
    bar: ProgressBar,
    start: Instant,
}

impl Phase {
    /// Begins a phase of `total` steps, or of an unknown number.
    pub(crate) fn start(name: &str, total: Option<u64>) -> Self {
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{prefix:28} [{bar:30}] {percent:>3}% {elapsed:>4}{left} {msg}",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{prefix:28} {spinner} {elapsed:>4} {msg}",
            ),
        };
        let bar = BARS.add(bar);
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let left = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            let done = (state.pos(), state.len().unwrap_or(0));
            if let Some(left) = remaining(state.elapsed(), done.0, done.1) {
                // The bar shows the rest without it.
                let _ = write!(text, ", {} left", HumanDuration(left));
            }
        };
        bar.set_style(style.progress_chars("#> ").with_key("left", left));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(TICK);
        if !stderr().is_terminal() {
            eprintln!("{name} ...");
        }
        Self {
            name: name.to_owned(),
            bar,
            start: Instant::now(),
        }
    }

    /// Shows how many steps are done.
    pub(crate) fn set(&self, steps: u64) {
        self.bar.set_position(steps);
    }

    /// Shows a few words next to the bar.
    pub(crate) fn say(&self, words: &str) {
        self.bar.set_message(words.to_owned());
    }

    /// Ends the phase, and prints a line.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
        BARS.suspend(|| {
            eprintln!(
                "{:28} done in {:.1} s",
                self.name,
                self.start.elapsed().as_secs_f64()
            );
        });
    }

    /// Runs a command with its output in `log`, and counts a step for each line.
    ///
    /// # Errors
    ///
    /// The command fails, or makes no progress; the end of its output is shown then.
    pub(crate) fn follow(&self, command: &mut Command, log: &Path) -> Result<()> {
        self.follow_within(command, log, STALL_LIMIT)
    }

    fn follow_within(&self, command: &mut Command, log: &Path, limit: Duration) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let file = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        // The command object holds the pipe's write end, and must close it.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let (end, ended) = mpsc::channel();
        let (is_stalled, logged) = thread::scope(|scope| {
            let child = &child;
            let watcher = scope.spawn(move || self.watch(child, &ended, limit));
            let logged = self.count_lines(File::from(reader), file);
            drop(end);
            (watcher.join().expect("it does not panic"), logged)
        });
        let status = child.wait()?;
        if status.success() && !is_stalled && logged.is_ok() {
            return Ok(());
        }
        self.bar.finish_and_clear();
        let output = String::from_utf8_lossy(&fs::read(log)?).into_owned();
        let from = output.lines().count().saturating_sub(40);
        output
            .lines()
            .skip(from)
            .for_each(|line| eprintln!("{line}"));
        let is_full = output.contains("No space left on device")
            || logged.is_err_and(|error| error.kind() == ErrorKind::StorageFull);
        let what = match is_stalled {
            true => format!(
                "printed nothing and used no processor for {} s, and was killed",
                limit.as_secs()
            ),
            false if is_full => {
                "found the disk full; make room and run the same command again, which continues"
                    .to_owned()
            }
            false => "failed".to_owned(),
        };
        let message = format!(
            "{}: {program} {what}; its output is in {}",
            self.name,
            log.display()
        );
        match is_full {
            true => Err(io::Error::from(ErrorKind::StorageFull)).context(message),
            false => bail!(message),
        }
    }

    /// Writes a command's output to a file, and counts its lines, to the end also if the disk is full: the command must
    /// not continue alone.
    fn count_lines(&self, output: File, mut file: File) -> io::Result<()> {
        let mut written = Ok(());
        for (steps, line) in (1..).zip(BufReader::new(output).split(b'\n')) {
            written = written.and_then(|()| {
                file.write_all(&line?)?;
                file.write_all(b"\n")
            });
            self.set(steps);
        }
        written
    }

    /// Kills a command that makes no progress, and returns whether it did. If standard error is not a terminal, it
    /// prints the command's progress.
    fn watch(&self, child: &Child, ended: &Receiver<()>, limit: Duration) -> bool {
        let (mut reported, mut moved) = (Instant::now(), Instant::now());
        let mut last = None;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(WATCH_INTERVAL) {
            let descendants = Descendants::of(child.id());
            let progress = (self.bar.position(), descendants.processor_time());
            if last.replace(progress) != Some(progress) || descendants.is_runnable() {
                moved = Instant::now();
            }
            if moved.elapsed() > limit {
                descendants.kill();
                return true;
            }
            self.report(&mut reported);
        }
        false
    }

    /// Waits until `done` returns a value.
    pub(crate) fn wait_for<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let mut reported = Instant::now();
        loop {
            if let Some(value) = done() {
                return value;
            }
            self.report(&mut reported);
            thread::sleep(WATCH_INTERVAL);
        }
    }

    /// Prints its progress, if it is time for that.
    fn report(&self, reported: &mut Instant) {
        if reported.elapsed() <= LOG_INTERVAL || stderr().is_terminal() {
            return;
        }
        *reported = Instant::now();
        let took = self.start.elapsed();
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let share = (done * 100).checked_div(total);
        let share = share.map_or_else(String::new, |share| format!("{} %, ", share.min(99)));
        let left = remaining(took, done, total);
        let left = left.map_or_else(String::new, |left| {
            format!(", about {} s left", left.as_secs())
        });
        eprintln!("{}: {share}{} s so far{left}", self.name, took.as_secs());
    }
}

/// How long the rest of `total` steps takes if each takes as long as those that are done. None while that is unknown,
/// and if there are more steps than expected.
fn remaining(took: Duration, done: u64, total: u64) -> Option<Duration> {
    let rest = total.saturating_sub(done);
    let is_known = rest > 0 && done > 0 && done * 100 >= total * FIRST_PART;
    is_known.then(|| took.mul_f64(rest as f64 / done as f64))
}

impl Drop for Phase {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_known_after_the_first_part() {
        let took = Duration::from_secs(120);
        assert_eq!(remaining(took, 0, 0), None);
        assert_eq!(remaining(took, 7, 100), None);
        assert_eq!(remaining(took, 10, 100), Some(Duration::from_secs(1080)));
        // A build may have more steps than expected, or an unknown number.
        assert_eq!(remaining(took, 100, 100), None);
        assert_eq!(remaining(took, 120, 100), None);
        assert_eq!(remaining(took, 7, 0), None);
    }

    #[test]
    fn a_failure_has_the_log() {
        let directory = std::env::temp_dir();
        let log = directory.join(format!("phase-{}.log", std::process::id()));
        let phase = Phase::start("failing", None);
        let error = phase
            .follow(Command::new("sh").args(["-c", "echo line; exit 3"]), &log)
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("failing: sh failed"), "{text}");
        assert_eq!(fs::read_to_string(&log).unwrap(), "line\n");
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_one_that_works_is_not() {
        let log = std::env::temp_dir().join(format!("stall-{}.log", std::process::id()));
        let limit = Duration::from_secs(2);
        let follow = |script: &str| {
            let phase = Phase::start("stalling", None);
            phase.follow_within(Command::new("sh").args(["-c", script]), &log, limit)
        };
        let error = follow("echo line; sleep 600").unwrap_err().to_string();
        assert!(error.contains("used no processor for 2 s"), "{error}");
        // It prints nothing for longer than the limit.
        follow("end=$(($(date +%s) + 5)); while [ $(date +%s) -lt $end ]; do :; done").unwrap();
        fs::remove_file(log).unwrap();
    }
}
