// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Time limits that hold on a busy machine.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::thread;
use std::time::{Duration, Instant};

use procfs::process::Process;

/// How long to wait for what a healthy guest or process does on any machine, however slow. What takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// How long a runnable thread may wait for a processor until that wait counts as time in which the process could run.
const STARVATION: Duration = Duration::from_secs(60);

/// How often runnable threads are checked.
const INTERVAL: Duration = Duration::from_millis(10);

/// Measures for how long a process could run. The clock stops while one of its threads is runnable and waits for a
/// processor. So a busy machine does not use up a time limit, but a process that hangs or sleeps does.
///
/// A wait is a loop. It asks [`Stopwatch::has_passed`] before it checks its condition, and fails after the check: this
/// thread, too, may wait for a processor in between.
#[derive(Debug)]
pub struct Stopwatch {
    process: u32,
    start: Instant,
    /// The threads at the start.
    before: HashMap<i32, Thread>,
}

impl Stopwatch {
    /// Starts to measure the process with this id.
    pub(crate) fn start(process: u32) -> Self {
        Self {
            process,
            start: Instant::now(),
            before: threads(process),
        }
    }

    /// The time since the start, less the time for which a thread waited for a processor: the
    /// longest of all threads. Without waits that have not ended.
    pub fn elapsed(&self) -> Duration {
        let longest = self.since_start(|thread| thread.waited).max();
        self.start
            .elapsed()
            .saturating_sub(longest.unwrap_or_default())
    }

    /// Whether that much time has passed. Cheap until it may have.
    pub fn has_passed(&self, time: Duration) -> bool {
        let has_passed = || self.start.elapsed() > time && self.elapsed() > time;
        // The kernel counts a wait for a processor at its end.
        has_passed() && {
            self.wait_until_run();
            has_passed()
        }
    }

    /// Starts again.
    pub(crate) fn restart(&mut self) {
        *self = Self::start(self.process);
    }

    /// Waits until each thread that is runnable now has run.
    fn wait_until_run(&self) {
        let before = threads(self.process);
        let start = Instant::now();
        let waits = |(id, now): (i32, Thread)| {
            now.is_runnable && before.get(&id).is_some_and(|before| *before == now)
        };
        while threads(self.process).into_iter().any(waits) && start.elapsed() < STARVATION {
            thread::sleep(INTERVAL);
        }
    }

    /// One of the times of each thread since the start.
    fn since_start(&self, time: fn(&Thread) -> Duration) -> impl Iterator<Item = Duration> {
        threads(self.process).into_iter().map(move |(id, now)| {
            let before = self.before.get(&id).map(time).unwrap_or_default();
            time(&now).saturating_sub(before)
        })
    }
}

/// How a process has spent the time.
impl Display for Stopwatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let ran: Duration = self.since_start(|thread| thread.ran).sum();
        let waited = self.since_start(|thread| thread.waited).max();
        write!(
            f,
            "process {} used a processor for {:.1} s, and waited for one for {:.1} s, in {:.1} s",
            self.process,
            ran.as_secs_f64(),
            waited.unwrap_or_default().as_secs_f64(),
            self.start.elapsed().as_secs_f64()
        )
    }
}

/// A thread at one moment.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    /// Whether it runs, or waits for a processor, and not for the first time.
    is_runnable: bool,
    /// For how long it has run.
    ran: Duration,
    /// For how long it has waited for a processor.
    waited: Duration,
}

/// The threads of a process. There are none if the process has ended, or if the machine's kernel does not count such
/// times.
fn threads(process: u32) -> HashMap<i32, Thread> {
    let process = i32::try_from(process).ok();
    let threads = process.and_then(|process| Process::new(process).ok()?.tasks().ok());
    threads
        .into_iter()
        .flatten()
        .filter_map(|thread| {
            let thread = thread.ok()?;
            let times = thread.schedstat().ok()?;
            let now = Thread {
                is_runnable: times.pcount > 0 && thread.stat().ok()?.state == 'R',
                ran: Duration::from_nanos(times.sum_exec_runtime),
                waited: Duration::from_nanos(times.run_delay),
            };
            Some((thread.tid, now))
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
        // It may wait for a processor before it sleeps.
        let state = || {
            let process = procfs::process::Process::new(process.0.id().try_into().unwrap());
            process.unwrap().stat().unwrap().state
        };
        while state() != 'S' {
            sleep(INTERVAL);
        }
        let stopwatch = Stopwatch::start(process.0.id());
        sleep(A_WHILE);
        assert!(stopwatch.elapsed() >= A_WHILE);
    }

    #[test]
    fn the_time_of_a_process_that_gets_no_processor_does_not_pass() {
        // Five on one processor, which one of them hardly gets.
        let status = procfs::process::Process::myself().and_then(|this| this.status());
        let (allowed, _) = status.unwrap().cpus_allowed_list.unwrap()[0];
        let busy = |nice: &str| {
            let mut command = Command::new("taskset");
            command.args(["-c", &allowed.to_string(), "nice", "-n", nice]);
            Process::start(command.args(["sh", "-c", "while :; do :; done"]))
        };
        let _others = ["0"; 4].map(busy);
        let process = busy("19");
        sleep(A_WHILE);
        let stopwatch = Stopwatch::start(process.0.id());
        let start = Instant::now();
        for _ in 0..20 {
            sleep(A_WHILE / 5);
            let half = start.elapsed() / 2;
            assert!(!stopwatch.has_passed(half), "{half:?}: {stopwatch}");
        }
    }
}
