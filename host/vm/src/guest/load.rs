// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Loads: programs that use memory in a guest and verify it.

use std::thread;
use std::time::Duration;

use agent::{Command, Exit, Load, LoadId, LoadStatus, Progress, Reply};
use anyhow::{Result, bail, ensure};

use super::{Guest, POLL_INTERVAL};
use crate::stopwatch::PATIENCE;

/// A running load in a guest.
#[derive(Debug)]
pub struct RunningLoad<'a> {
    guest: &'a Guest,
    id: LoadId,
}

impl Guest {
    /// Starts a load, and waits until it has completed its first pass.
    pub fn load(&self, load: Load) -> Result<RunningLoad<'_>> {
        let load = self.start_load(load)?;
        load.wait_passes(1)?;
        Ok(load)
    }

    /// Starts a load.
    pub fn start_load(&self, load: Load) -> Result<RunningLoad<'_>> {
        match self.call(Command::StartLoad(load), PATIENCE)? {
            Reply::Load(id) => Ok(RunningLoad { guest: self, id }),
            reply => bail!("the agent answers {reply:?} to a load"),
        }
    }

    /// A load that was started before the guest was hibernated.
    pub fn running(&self, id: LoadId) -> RunningLoad<'_> {
        RunningLoad { guest: self, id }
    }
}

impl RunningLoad<'_> {
    /// Its name in the guest.
    pub fn id(&self) -> LoadId {
        self.id
    }

    /// Its status.
    pub fn status(&self) -> Result<LoadStatus> {
        self.call(Command::LoadStatus(self.id), PATIENCE)
    }

    /// Waits for `passes` more passes. In each pass the load verifies all of its memory.
    ///
    /// # Errors
    ///
    /// It has failed, or takes too long.
    pub fn verify(&self, passes: u64) -> Result<()> {
        self.wait_passes(self.status()?.progress.passes + passes)
    }

    fn wait_passes(&self, passes: u64) -> Result<()> {
        self.follow(|status| {
            ensure!(
                status.exit.is_none_or(|exit| exit == Exit::Status(0)),
                "a load ends with {:?}: {}",
                status.exit,
                status.stderr.trim_end()
            );
            Ok(status.progress.passes >= passes)
        })?;
        Ok(())
    }

    /// Waits until it has ended by itself or has been killed.
    pub fn wait(&self) -> Result<LoadStatus> {
        self.follow(|status| Ok(status.exit.is_some()))
    }

    /// Waits until `condition` holds, for as long as it makes progress.
    fn follow(&self, condition: impl Fn(&LoadStatus) -> Result<bool>) -> Result<LoadStatus> {
        let mut stopwatch = self.guest.stopwatch();
        let mut last = Progress::default();
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            let status = self.status()?;
            if condition(&status)? {
                return Ok(status);
            }
            self.guest.check_alive()?;
            if status.progress != last {
                last = status.progress;
                stopwatch.restart();
            } else {
                ensure!(
                    !is_over,
                    "a load makes no progress for {} s ({stopwatch}): {last:?}",
                    PATIENCE.as_secs()
                );
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Stops it, and waits for its end.
    ///
    /// # Errors
    ///
    /// It has failed, or has been killed.
    pub fn stop(self) -> Result<LoadStatus> {
        let status = self.call(Command::StopLoad(self.id), PATIENCE)?;
        ensure!(
            status.exit == Some(Exit::Status(0)),
            "a load ends with {:?}: {}",
            status.exit,
            status.stderr.trim_end()
        );
        Ok(status)
    }

    fn call(&self, command: Command, timeout: Duration) -> Result<LoadStatus> {
        match self.guest.call(command, timeout)? {
            Reply::Status(status) => Ok(status),
            reply => bail!("the agent answers {reply:?} about a load"),
        }
    }
}
