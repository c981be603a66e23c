// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Time limits that hold on a busy machine.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use procfs::process::Process;

/// Measures for how long a process could run. The clock stops while one of its threads is runnable and waits for a
/// processor. So a busy machine does not use up a time limit, but a process that hangs or sleeps does.
#[derive(Debug)]
pub struct Stopwatch {
    process: u32,
    start: Instant,
    /// For how long each thread had waited for a processor at the start.
    waits: HashMap<i32, Duration>,
}

impl Stopwatch {
    /// Starts to measure the process with this id.
    pub(crate) fn start(process: u32) -> Self {
        Self {
            process,
            start: Instant::now(),
            waits: waits(process),
        }
    }

    /// The time since the start, less the time for which a thread waited for a processor: the
    /// longest of all threads.
    pub fn elapsed(&self) -> Duration {
        let before = |thread| self.waits.get(thread).copied().unwrap_or_default();
        let longest = waits(self.process)
            .iter()
            .map(|(thread, wait)| wait.saturating_sub(before(thread)))
            .max();
        self.start
            .elapsed()
            .saturating_sub(longest.unwrap_or_default())
    }

    /// Whether that much time has passed. Cheap until it may have.
    pub fn has_passed(&self, time: Duration) -> bool {
        self.start.elapsed() > time && self.elapsed() > time
    }

    /// Starts again.
    pub(crate) fn restart(&mut self) {
        *self = Self::start(self.process);
    }
}

/// For how long each thread of a process has waited for a processor. There are none if the process has ended, or if the
/// machine's kernel does not count that.
fn waits(process: u32) -> HashMap<i32, Duration> {
    let process = i32::try_from(process).ok();
    let threads = process.and_then(|process| Process::new(process).ok()?.tasks().ok());
    threads
        .into_iter()
        .flatten()
        .filter_map(|thread| {
            let thread = thread.ok()?;
            let wait = thread.schedstat().ok()?.run_delay;
            Some((thread.tid, Duration::from_nanos(wait)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread::sleep;

    use super::*;

    const A_WHILE: Duration = Duration::from_millis(300);

    /// A process, which is killed at the end.
    struct Process(std::process::Child);

    impl Process {
        fn start(command: &mut Command) -> Self {
            Self(command.spawn().unwrap())
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_time_of_a_process_that_sleeps_passes() {
        let process = Process::start(Command::new("sleep").arg("60"));
        let stopwatch = Stopwatch::start(process.0.id());
        sleep(A_WHILE);
        // It may have waited for a processor before it slept.
        assert!(stopwatch.elapsed() > A_WHILE / 2);
    }

    #[test]
    fn the_time_of_a_process_that_gets_no_processor_does_not_pass() {
        // Five on one processor: each of them waits for most of the time.
        let status = procfs::process::Process::myself().and_then(|this| this.status());
        let (allowed, _) = status.unwrap().cpus_allowed_list.unwrap()[0];
        let busy = || {
            let mut command = Command::new("taskset");
            command.args(["-c", &allowed.to_string()]);
            Process::start(command.args(["sh", "-c", "while :; do :; done"]))
        };
        let processes: Vec<_> = (0..5).map(|_| busy()).collect();
        sleep(A_WHILE);
        let stopwatch = Stopwatch::start(processes[0].0.id());
        let start = Instant::now();
        sleep(A_WHILE * 4);
        assert!(stopwatch.elapsed() < start.elapsed() / 2);
    }
}
