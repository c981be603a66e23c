// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process with all of its descendants.

use std::collections::HashSet;

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

    /// Their CPU time, with that of processes that have ended, in clock ticks.
    pub(crate) fn processor_time(&self) -> u64 {
        self.0
            .iter()
            .map(|stat| {
                let ended = u64::try_from(stat.cutime + stat.cstime).unwrap_or_default();
                stat.utime + stat.stime + ended
            })
            .sum()
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn children_of_children_count() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'while :; do :; done'; true"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = Descendants::of(child.id()).processor_time();
        sleep(Duration::from_millis(500));
        let descendants = Descendants::of(child.id());
        assert!(descendants.processor_time() > before);
        assert!(descendants.0.len() >= 2);
        descendants.kill();
        assert!(!child.wait().unwrap().success());
    }
}
