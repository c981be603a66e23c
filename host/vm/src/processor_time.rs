// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The CPU time of the host and of the guest.

use std::time::Duration;

use anyhow::{Context, Result};
use procfs::process::Process;
use procfs::ticks_per_second;

use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::threads::of_threads;

/// The guest's clock ticks per second.
const GUEST_TICKS: u64 = 100;

impl Guest {
    /// The CPU time of QEMU and the daemon, the guest's part included, in units of 10 ms.
    pub fn host_cpu_time(&self) -> Result<Duration> {
        let home = self.home();
        let mut total = of_process(home.qemu.id())?;
        if let Some(daemon) = &home.daemon {
            total += daemon.cpu_time()?;
        }
        Ok(total)
    }

    /// The CPU time of QEMU without the guest's processors, and of the daemon. It leaves out threads of the daemon that
    /// have ended, as one that answers a client does with the connection.
    pub fn device_cpu_time(&self) -> Result<Duration> {
        let home = self.home();
        let qemu = home.qemu.id();
        let guest = of_threads(qemu.try_into()?, |name| name.starts_with("CPU "))?;
        let mut total = of_process(qemu)?.saturating_sub(guest);
        if let Some(daemon) = &home.daemon {
            total += daemon.thread_time()?;
        }
        Ok(total)
    }

    /// For how long the guest's processors have not been idle, as the guest counts it, in units of 10 ms.
    pub fn guest_cpu_time(&self) -> Result<Duration> {
        let stat = self.read_file("/proc/stat")?;
        let line = stat
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("cpu "));
        let fields = line.context("the guest's /proc/stat has no processors")?;
        // User and system time with their variants; idle time and I/O wait are in between.
        let ticks: u64 = fields
            .split_whitespace()
            .enumerate()
            .filter(|(place, _)| matches!(place, 0..=2 | 5..=6))
            .map(|(_, field)| {
                field
                    .parse::<u64>()
                    .context("processor times are no numbers")
            })
            .sum::<Result<u64>>()?;
        Ok(Duration::from_millis(ticks * 1000 / GUEST_TICKS))
    }
}

impl Daemon {
    /// The CPU time of its two processes.
    fn cpu_time(&self) -> Result<Duration> {
        Ok(of_process(self.id()?)? + of_process(self.worker()?.as_raw().try_into()?)?)
    }
}

/// The CPU time of a process.
fn of_process(pid: u32) -> Result<Duration> {
    let stat = Process::new(pid.try_into()?)?.stat()?;
    let milliseconds = (stat.utime + stat.stime) * 1000 / ticks_per_second();
    Ok(Duration::from_millis(milliseconds))
}
