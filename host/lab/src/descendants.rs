// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process with all of its descendants.

use std::collections::HashSet;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::process::{Stat, all_processes};

/// A process and those that descend from it, at one moment.
pub(crate) struct Descendants(Vec<Stat>);

impl Descendants {
    /// Those of the process with this number.
    pub(crate) fn of(process: u32) -> Self {
        let mut others: Vec<_> = all_processes()
            .into_iter()
            .flatten()
            .filter_map(|process| process.ok()?.stat().ok())
            .collect();
        let mut found = Vec::new();
        let mut parents = HashSet::from([i32::try_from(process).unwrap_or_default()]);
        loop {
            let (new, rest): (Vec<_>, Vec<_>) = others
                .into_iter()
                .partition(|stat| parents.contains(&stat.ppid) || parents.contains(&stat.pid));
            if new.is_empty() {
                return Self(found);
            }
            parents.extend(new.iter().map(|stat| stat.pid));
            found.extend(new);
            others = rest;
        }
    }

    /// Their CPU time, with that of processes that have ended.
    pub(crate) fn processor_time(&self) -> Duration {
        let ticks: u64 = self
            .0
            .iter()
            .map(|stat| {
                let ended = u64::try_from(stat.cutime + stat.cstime).unwrap_or_default();
                stat.utime + stat.stime + ended
            })
            .sum();
        Duration::from_millis(ticks * 1000 / procfs::ticks_per_second())
    }

    /// Whether one of them runs, or waits for a processor.
    pub(crate) fn is_runnable(&self) -> bool {
        self.0.iter().any(|stat| stat.state == 'R')
    }

    /// Kills them.
    pub(crate) fn kill(&self) {
        for stat in &self.0 {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(stat.pid), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::thread::sleep;
    use std::time::Instant;

    use super::*;

    #[test]
    fn children_of_children_count() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'while :; do :; done'; true"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = Descendants::of(child.id()).processor_time();
        let start = Instant::now();
        let descendants = loop {
            let now = Descendants::of(child.id());
            if now.0.len() >= 2 && now.processor_time() > before {
                break now;
            }
            assert!(start.elapsed() < Duration::from_secs(60));
            sleep(Duration::from_millis(10));
        };
        descendants.kill();
        assert!(!child.wait().unwrap().success());
    }
}
