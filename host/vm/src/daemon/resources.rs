// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's resources that a daemon uses.

use std::time::Duration;

use anyhow::{Context, Result};
use procfs::process::Process;

use super::Daemon;
use crate::size::Size;
use crate::threads::of_threads;

impl Daemon {
    /// The anonymous memory of its two processes: all of their memory but programs and the guest's memory.
    pub fn memory(&self) -> Result<Size> {
        let of = |pid: i32| -> Result<Size> {
            let kib = Process::new(pid)?.status()?.rssanon;
            Ok(Size::kib(kib.context("a process of the daemon has ended")?))
        };
        self.pids()?.map(of).into_iter().sum()
    }

    /// The CPU time of the threads that its two processes have now. A thread that answers a client ends with the
    /// client's connection.
    pub fn thread_time(&self) -> Result<Duration> {
        let [supervisor, worker] = self.pids()?;
        Ok(of_threads(supervisor, |_| true)? + of_threads(worker, |_| true)?)
    }

    fn pids(&self) -> Result<[i32; 2]> {
        Ok([self.id()?.try_into()?, self.worker()?.as_raw()])
    }
}
