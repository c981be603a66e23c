// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's resources that a daemon uses.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use procfs::process::Process;

use super::Daemon;
use crate::size::Size;

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
        let mut total = 0;
        for pid in self.pids()? {
            for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
                // It may have ended meanwhile.
                let times = fs::read_to_string(thread?.path().join("schedstat"));
                total += nanoseconds(&times.unwrap_or_default());
            }
        }
        Ok(Duration::from_nanos(total))
    }

    fn pids(&self) -> Result<[i32; 2]> {
        Ok([self.id()?.try_into()?, self.worker()?.as_raw()])
    }
}

/// The first number of a schedstat file.
fn nanoseconds(times: &str) -> u64 {
    let first = times.split_whitespace().next();
    first.and_then(|time| time.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_on_a_processor_comes_first() {
        assert_eq!(nanoseconds("877068 86288 2\n"), 877_068);
        assert_eq!(nanoseconds(""), 0);
    }
}
