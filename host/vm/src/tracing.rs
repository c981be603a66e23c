// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The actions of a driver's tasks in the guest, from the kernel's trace events.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::driver::Driver;
use crate::guest::Guest;
use crate::size::Size;

const TRACING: &str = "/sys/kernel/tracing";

/// Room for the events of each processor: of the C driver that inflates 7 GiB, and of one that allocates blocks.
const LARGE_BUFFER: Size = Size::mib(16);
const SMALL_BUFFER: Size = Size::mib(2);

/// When tasks begin and end.
const TASKS: &[&str] = &[
    "workqueue/workqueue_execute_start",
    "workqueue/workqueue_execute_end",
];

/// When a processor switches to another process.
const SWITCHES: &[&str] = &["sched/sched_switch"];

/// When memory is allocated: pages, and what is smaller.
const ALLOCATIONS: &[&str] = &[
    "kmem/mm_page_alloc",
    "kmem/kmalloc",
    "kmem/kmem_cache_alloc",
];

/// When the kernel has evacuated pageblocks, for which it first drains the per-CPU page lists.
const DRAINS: &[&str] = &["page_isolation/test_pages_isolated"];

/// What a section of the kernel can disable, by the names of the kernel's tracers.
#[derive(Clone, Copy, Debug)]
pub enum Off {
    /// Interrupts.
    Interrupts,
    /// Preemption.
    Preemption,
}

impl Off {
    fn tracer(self) -> &'static str {
        match self {
            Self::Interrupts => "irqsoff",
            Self::Preemption => "preemptoff",
        }
    }
}

/// A section of the kernel with interrupts or preemption off.
#[derive(Debug)]
pub struct Section {
    /// How long that took.
    pub time: Duration,
    /// Where it began, and where it ended.
    pub ends: [String; 2],
    /// The stack at the end, the innermost function first.
    pub stack: Vec<String>,
}

impl Section {
    /// Reads the trace of the longest one.
    fn parse(trace: &str) -> Result<Self> {
        let after = |mark: &str| {
            let rest = trace.lines().find_map(|line| line.strip_prefix(mark));
            rest.with_context(|| format!("the trace has no line with {mark:?}"))
        };
        let words = after("# latency: ")?;
        let (microseconds, _) = words.split_once(" us").context("the trace has no time")?;
        Ok(Self {
            time: Duration::from_micros(microseconds.parse()?),
            ends: [after("#  => started at:")?, after("#  => ended at:")?]
                .map(|end| end.trim().to_owned()),
            stack: trace
                .lines()
                .filter_map(|line| line.strip_prefix(" => "))
                .map(|function| function.trim().to_owned())
                .collect(),
        })
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [start, end] = &self.ends;
        let stack = self.stack.join(" < ");
        write!(f, "{:?} from {start} to {end}: {stack}", self.time)
    }
}

impl Guest {
    /// Calls a function, and returns the longest section of the kernel with interrupts or
    /// preemption off meanwhile.
    pub fn trace_longest<T>(
        &self,
        off: Off,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Section)> {
        let set = |file: &str, value: &str| self.write_file(&format!("{TRACING}/{file}"), value);
        set("current_tracer", off.tracer())?;
        set("tracing_max_latency", "0")?;
        let result = work()?;
        let trace = self.read_file(&format!("{TRACING}/trace"))?;
        set("current_tracer", "nop")?;
        Ok((result, Section::parse(&trace)?))
    }

    /// Calls a function, and returns how many times the kernel drained the per-CPU page lists meanwhile to allocate a
    /// given range.
    pub fn trace_drains<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
        let (result, trace) = self.trace(DRAINS, SMALL_BUFFER, work)?;
        Ok((result, events(&trace).count()))
    }

    /// Calls a function, and returns the CPU time of the driver's tasks meanwhile.
    pub fn trace_running<T>(
        &self,
        driver: Driver,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Duration)> {
        let (result, trace) = self.trace(&[TASKS, SWITCHES].concat(), LARGE_BUFFER, work)?;
        Ok((result, running(&trace, driver)?))
    }

    /// Calls a function, and returns how many times the driver's tasks have allocated memory meanwhile, for the
    /// balloon or for themselves.
    pub fn trace_allocations<T>(
        &self,
        driver: Driver,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, usize)> {
        let (result, trace) = self.trace(&[TASKS, ALLOCATIONS].concat(), SMALL_BUFFER, work)?;
        Ok((result, allocations(&trace, driver)?))
    }

    /// Calls a function, and returns the driver's own events meanwhile, without the prefix `virtio_balloon_rs_`:
    /// `inflate: virtio0: pages=1024`.
    pub fn trace_balloon<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<String>)> {
        let (result, events) = self.trace_balloon_times(work)?;
        Ok((result, events.into_iter().map(|(_, event)| event).collect()))
    }

    /// The same with the time of each event, by the guest's clock.
    pub fn trace_balloon_times<T>(
        &self,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<(Duration, String)>)> {
        let (result, trace) = self.trace(&["virtio_balloon_rs"], SMALL_BUFFER, work)?;
        let events = events(&trace).filter_map(|event| {
            let name = event.name.strip_prefix("virtio_balloon_rs_")?;
            Some((event.time, format!("{name}: {}", event.rest)))
        });
        Ok((result, events.collect()))
    }

    /// Calls a function, and returns the trace of it.
    fn trace<T>(
        &self,
        events: &[&str],
        buffer: Size,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, String)> {
        let set = |file: &str, value: &str| self.write_file(&format!("{TRACING}/{file}"), value);
        let switch = |value: &str| {
            let mut events = events.iter();
            events.try_for_each(|event| set(&format!("events/{event}/enable"), value))
        };
        set("buffer_size_kb", &(buffer.as_bytes() >> 10).to_string())?;
        set("trace", "")?;
        switch("1")?;
        let result = work()?;
        switch("0")?;
        let trace = self.read_file(&format!("{TRACING}/trace"))?;
        let counts = trace
            .lines()
            .find_map(|line| line.strip_prefix("# entries-in-buffer/entries-written:"));
        let counts = counts.context("the trace has no header")?;
        let (kept, written) = counts
            .split_whitespace()
            .next()
            .and_then(|counts| counts.split_once('/'))
            .context("the trace has no numbers")?;
        ensure!(
            kept == written,
            "{kept} of {written} events are in the trace"
        );
        Ok((result, trace))
    }
}

/// An event.
struct Event<'a> {
    /// The process of the event.
    process: &'a str,
    time: Duration,
    name: &'a str,
    rest: &'a str,
}

impl<'a> Event<'a> {
    /// Reads a line such as `kworker/0:1-12 [000] d..2. 3.123456: sched_switch: prev_comm=...`.
    fn parse(line: &'a str) -> Option<Self> {
        let (process, line) = line.split_once(" [")?;
        let (_, process) = process.trim().rsplit_once('-')?;
        let (before, line) = line.split_once(": ")?;
        let (name, rest) = line.split_once(": ")?;
        let seconds = before.split_whitespace().next_back()?.parse().ok()?;
        Some(Self {
            process,
            time: Duration::from_secs_f64(seconds),
            name,
            rest,
        })
    }

    /// Whether it is about a task of the driver.
    fn is_of(&self, driver: Driver) -> bool {
        self.rest.ends_with(&format!("[{}]", driver.name()))
    }

    /// A value in it, such as that of `next_pid`.
    fn value(&self, name: &str) -> Option<&'a str> {
        let mut words = self.rest.split_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The events of a trace.
fn events(trace: &str) -> impl Iterator<Item = Event<'_>> {
    trace
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(Event::parse)
}

/// For how long the driver's tasks ran.
fn running(trace: &str, driver: Driver) -> Result<Duration> {
    let mut total = Duration::ZERO;
    // The process that has a task, and since when it runs, if it does.
    let mut task: Option<(&str, Option<Duration>)> = None;
    let mut tasks = 0;
    for event in events(trace) {
        let stop = |since: Option<Duration>| since.map_or(Duration::ZERO, |at| event.time - at);
        match (event.name, &mut task) {
            ("workqueue_execute_start", None) if event.is_of(driver) => {
                task = Some((event.process, Some(event.time)));
                tasks += 1;
            }
            ("workqueue_execute_end", Some((process, since))) if *process == event.process => {
                total += stop(*since);
                task = None;
            }
            ("sched_switch", Some((process, since))) => {
                if event.value("prev_pid") == Some(process) {
                    total += stop(since.take());
                } else if event.value("next_pid") == Some(process) {
                    *since = Some(event.time);
                }
            }
            _ => {}
        }
    }
    ensure!(tasks > 0, "no task of {} was seen", driver.name());
    Ok(total)
}

/// How often the driver's tasks have allocated memory.
fn allocations(trace: &str, driver: Driver) -> Result<usize> {
    let mut number = 0;
    let mut tasks = 0;
    let mut task = None;
    for event in events(trace) {
        match event.name {
            "workqueue_execute_start" if event.is_of(driver) => {
                task = Some(event.process);
                tasks += 1;
            }
            "workqueue_execute_end" if task == Some(event.process) => task = None,
            name if ALLOCATIONS.iter().any(|event| event.ends_with(name)) => {
                number += usize::from(task == Some(event.process));
            }
            _ => {}
        }
    }
    ensure!(tasks > 0, "no task of {} was seen", driver.name());
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#              | |         |   |||||     |         |
     kworker/0:1-12      [000] .....     1.000000: workqueue_execute_start: work struct 0000000012345678: function update [virtio_balloon]
     kworker/0:1-12      [000] .....     1.100000: mm_page_alloc: page=00000000 pfn=0x1 order=0 migratetype=1 gfp_flags=0
     kworker/0:1-12      [000] d..2.     2.000000: sched_switch: prev_comm=kworker/0:1 prev_pid=12 prev_prio=120 prev_state=D ==> next_comm=swapper/0 next_pid=0 next_prio=120
          <idle>-0       [000] d..2.     3.500000: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=kworker/0:1 next_pid=12 next_prio=120
           agent-70      [001] .....     3.600000: kmalloc: call_site=x
     kworker/0:1-12      [000] .....     4.000000: workqueue_execute_end: work struct 0000000012345678: function update [virtio_balloon]
     kworker/0:1-12      [000] .....     4.100000: mm_page_alloc: page=00000000 pfn=0x1 order=0 migratetype=1 gfp_flags=0
";

    #[test]
    fn waiting_is_not_running() {
        let took = running(TRACE, Driver::C).unwrap();
        assert_eq!(took, Duration::from_millis(1500));
        assert!(running(TRACE, Driver::Rust).is_err());
    }

    #[test]
    fn only_the_driver_s_allocations_count() {
        assert_eq!(allocations(TRACE, Driver::C).unwrap(), 1);
        assert!(allocations(TRACE, Driver::Rust).is_err());
    }

    #[test]
    fn the_longest_section_is_read() {
        let trace = "\
# tracer: irqsoff
#
# irqsoff latency trace v1.1.5 on 7.3.4
# --------------------------------------------------------------------
# latency: 259 us, #4/4, CPU#0 | (M:preempt(lazy) VP:0, KP:0, SP:0 HP:0 #P:1)
#    -----------------
#  => started at: _raw_spin_lock_irqsave
#  => ended at:   _raw_spin_unlock_irqrestore
# => stack trace
 => __rmqueue_pcplist
 => migrate_pages
";
        let section = Section::parse(trace).unwrap();
        assert_eq!(section.time, Duration::from_micros(259));
        assert_eq!(
            section.to_string(),
            "259µs from _raw_spin_lock_irqsave to _raw_spin_unlock_irqrestore: __rmqueue_pcplist < migrate_pages"
        );
        assert!(Section::parse("# tracer: irqsoff\n").is_err());
    }
}
