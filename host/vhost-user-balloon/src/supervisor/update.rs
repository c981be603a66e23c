// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Replaces the program of both processes, and returns to the previous one if the new one does not
//! work.

use std::env;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use log::{error, info};
use sd_notify::NotifyState;

use super::Supervisor;
use super::program::{RESUME, command};
use super::snapshot::{Snapshot, notify};
use super::worker::Worker;

impl Supervisor {
    /// Starts a trial of the program at this supervisor's path.
    pub(super) fn update(&mut self) {
        info!("trying the program {}", self.program.display());
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        match Worker::start_trial(&self.program, &self.arguments) {
            Ok(trial) => self.trial = Some(trial),
            Err(error) => self.keep_program(&format!("{error:#}")),
        }
    }

    /// Gives up a new program.
    fn keep_program(&mut self, reason: &str) {
        error!(
            "the program {} does not start; continuing with the running one: {reason}",
            self.program.display()
        );
        self.trial = None;
        notify(&[NotifyState::Ready]);
    }

    /// Takes the new program if its worker is ready.
    pub(super) fn check_trial(&mut self) {
        let Some(trial) = &mut self.trial else {
            return;
        };
        trial.read();
        if trial.is_ready() {
            trial.stop();
            trial.wait();
            self.trial = None;
            let program = self.program.clone();
            let own_program = self.own_program.try_clone().ok();
            self.replace_program(&program, own_program.as_ref().map(AsFd::as_fd));
        } else if let Some(status) = trial.status() {
            self.keep_program(&format!("it ends with {status}"));
        } else if trial.deadline().is_some_and(|due| Instant::now() >= due) {
            self.keep_program("it is not ready in time");
        }
    }

    /// Replaces the program of this process. Passes on the running program as the fallback. Returns if
    /// that is not possible.
    pub(super) fn replace_program(&mut self, program: &Path, fallback: Option<BorrowedFd<'_>>) {
        self.stop_worker();
        self.save();
        let snapshot = Snapshot {
            program: fallback,
            ..self.snapshot()
        };
        let error = match snapshot.store(self.store.number()) {
            Ok(stored) => command(program)
                .args(env::args_os().skip(1).filter(|argument| argument != RESUME))
                .arg(RESUME)
                .stdin(Stdio::from(stored.into_socket()))
                .exec()
                .into(),
            Err(error) => error,
        };
        self.keep_program(&format!("{error:#}"));
    }
}
