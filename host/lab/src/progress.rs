// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bars for what takes its time. Where standard error is no terminal, a line says what begins
//! and another one how long it took.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write, stderr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

const TICK: Duration = Duration::from_millis(100);

/// Something that takes its time.
pub(crate) struct Phase {
    name: String,
    bar: ProgressBar,
    start: Instant,
}

impl Phase {
    /// Begins a phase of `total` steps, or of nobody knows how many.
    pub(crate) fn start(name: &str, total: Option<u64>) -> Self {
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{prefix:28} [{bar:30}] {percent:>3}% {elapsed:>4} {msg}",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{prefix:28} {spinner} {elapsed:>4} {msg}",
            ),
        };
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        bar.set_style(style.progress_chars("#> "));
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

    /// Shows a few words beside the bar.
    pub(crate) fn say(&self, words: &str) {
        self.bar.set_message(words.to_owned());
    }

    /// Ends the phase, and leaves a line that says so.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
        eprintln!(
            "{:28} done in {:.1} s",
            self.name,
            self.start.elapsed().as_secs_f64()
        );
    }

    /// Runs a command with its output going to `log`, and takes a step for each line of it.
    ///
    /// # Errors
    ///
    /// The command fails; its output is shown then.
    pub(crate) fn follow(&self, command: &mut Command, log: &Path) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut file = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        // The command object has the pipe's writing end, and must not keep it open.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for (steps, line) in (1..).zip(BufReader::new(File::from(reader)).split(b'\n')) {
            file.write_all(&line?)?;
            file.write_all(b"\n")?;
            self.set(steps);
        }
        if !child.wait()?.success() {
            self.bar.finish_and_clear();
            let output = String::from_utf8_lossy(&fs::read(log)?).into_owned();
            let from = output.lines().count().saturating_sub(40);
            output
                .lines()
                .skip(from)
                .for_each(|line| eprintln!("{line}"));
            bail!(
                "{}: {program} failed; all that it said is in {}",
                self.name,
                log.display()
            );
        }
        Ok(())
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
