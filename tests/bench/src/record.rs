// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The records of measurements.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vm::{Guest, Samples, Sent, Size, Zeroing};

use crate::contestant::{By, Contestant, Device};
use crate::division::Division;

/// The subject of a measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    name: &'static str,
    contestant: Contestant,
    memory: Size,
    amount: Size,
    detail: Option<String>,
    zeroing: Zeroing,
}

impl Subject {
    /// The subject `name` of a benchmark, with one of the contestants, for `amount` of a guest's
    /// `memory`.
    pub fn new(name: &'static str, contestant: Contestant, memory: Size, amount: Size) -> Self {
        Self {
            name,
            contestant,
            memory,
            amount,
            detail: None,
            zeroing: Zeroing::default(),
        }
    }

    /// The same subject in a variant.
    pub fn detail(mut self, detail: &str) -> Self {
        self.detail = Some(detail.to_owned());
        self
    }

    /// The same subject with another setting of the guest's kernel.
    pub(crate) fn zeroing(mut self, zeroing: Zeroing) -> Self {
        self.zeroing = zeroing;
        self
    }
}

/// The results of one run, as far as they were measured.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// How long it took.
    pub took: Duration,
    /// The messages that the guest has sent.
    pub sent: Option<Sent>,
    /// The interrupts of the balloon or virtio-mem device.
    pub interrupts: Option<u64>,
    /// The time of the host's processors, the guest's part included.
    pub host_cpu: Option<Duration>,
    /// The time of the guest's processors, as the guest sees it.
    pub guest_cpu: Option<Duration>,
    /// The copied memory.
    pub transferred: Option<Size>,
    /// The time of the stages.
    pub stages: Option<Stages>,
    /// Bits sent per page of the covered memory.
    pub bits_per_page: Option<f64>,
    /// How much more of the host's memory the guest used meanwhile.
    pub peak: Option<Size>,
    /// The throughput of a load in the guest meanwhile, relative to its usual throughput.
    pub throughput: Option<f64>,
    /// By how much a periodic task in the guest was late, at most.
    pub stall: Option<Duration>,
    /// The time of the host's processors for what is not a processor of the guest.
    pub device_cpu: Option<Duration>,
    /// The memory that the daemon had afterwards.
    pub daemon_memory: Option<Size>,
    /// How long the machine took to write memory before. [`Bench::add`](crate::Bench::add) sets it.
    pub machine: Option<Duration>,
    /// How the host's memory was divided between guests.
    pub division: Option<Division>,
}

/// The stages of inflating.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stages {
    /// The driver runs: it allocates pages, accounts for them and writes messages, in seconds.
    pub allocate: f64,
    /// Neither the driver nor the device runs: notifications and interrupts are in flight, in
    /// seconds.
    pub send: f64,
    /// The device decodes messages, in seconds.
    pub translate: f64,
    /// The host takes the memory, in seconds.
    pub give_back: f64,
}

/// The runs of a subject. All fields but `seconds` are medians of the runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The subject.
    pub name: String,
    /// The mechanism in the guest.
    pub driver: By,
    /// The device.
    pub device: Device,
    /// The variant, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Whether the guest's kernel zeroes memory that it allocates.
    #[serde(default)]
    pub zeroing: Zeroing,
    /// The commit of the sources, with a `+` if they have changed since. Unknown without git.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The guest's memory.
    pub guest_mib: u64,
    /// The amount that the guest returns or migrates.
    pub amount_mib: u64,
    /// How long each run took, in seconds.
    pub seconds: Samples,
    /// How much the guest has sent, in bytes.
    pub wire_bytes: Option<u64>,
    /// How many times the device was notified.
    pub notifications: Option<u64>,
    /// How many interrupts the guest had from the balloon or virtio-mem device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupts: Option<u64>,
    /// The time of the host's processors, the guest's part included, in seconds.
    pub host_cpu_s: Option<f64>,
    /// The time of the guest's processors, as the guest sees it, in seconds.
    pub guest_cpu_s: Option<f64>,
    /// The copied memory.
    pub transferred_mib: Option<u64>,
    /// The time of the stages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stages: Option<Stages>,
    /// Bits sent per page of the covered memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_page: Option<f64>,
    /// How much more of the host's memory the guest used meanwhile, in the run with the most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_mib: Option<u64>,
    /// The throughput of a load in the guest meanwhile in each run, relative to its usual
    /// throughput.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<Samples>,
    /// By how much a periodic task in the guest was late at most in each run, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_ms: Option<Samples>,
    /// The time of the host's processors for what is not a processor of the guest, without that for the benchmark's own
    /// questions, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_cpu_s: Option<f64>,
    /// The anonymous memory of the daemon afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon_kib: Option<u64>,
    /// How long the machine took to write 256 MiB of memory before each run, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_ms: Option<Samples>,
    /// How the host's memory was divided between guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub division: Option<Division>,
}

impl Record {
    pub(crate) fn new(subject: &Subject, runs: &[Run]) -> Self {
        let all = |value: &dyn Fn(&Run) -> Option<f64>| -> Option<Samples> {
            let values: Vec<f64> = runs.iter().filter_map(value).collect();
            (!values.is_empty()).then(|| values.into_iter().collect())
        };
        let median = |value: &dyn Fn(&Run) -> Option<f64>| all(value).map(|all| all.median());
        // The value of one run, since the mean of two may be no whole number.
        let whole = |value: &dyn Fn(&Run) -> Option<u64>| -> Option<u64> {
            let mut values: Vec<u64> = runs.iter().filter_map(value).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied()
        };
        let seconds = |time: Duration| time.as_secs_f64();
        let stage = |stage: fn(Stages) -> f64| median(&|run| run.stages.map(stage));
        Self {
            name: subject.name.to_owned(),
            driver: subject.contestant.driver,
            device: subject.contestant.device,
            detail: subject.detail.clone(),
            zeroing: subject.zeroing,
            commit: None,
            guest_mib: subject.memory.as_mib(),
            amount_mib: subject.amount.as_mib(),
            seconds: runs.iter().map(|run| seconds(run.took)).collect(),
            wire_bytes: whole(&|run| Some(run.sent.as_ref()?.bytes)),
            notifications: whole(&|run| Some(run.sent.as_ref()?.notifications)),
            interrupts: whole(&|run| run.interrupts),
            host_cpu_s: median(&|run| run.host_cpu.map(seconds)),
            guest_cpu_s: median(&|run| run.guest_cpu.map(seconds)),
            transferred_mib: whole(&|run| Some(run.transferred?.as_mib())),
            stages: stage(|stages| stages.allocate).map(|allocate| Stages {
                allocate,
                send: stage(|stages| stages.send).unwrap_or_default(),
                translate: stage(|stages| stages.translate).unwrap_or_default(),
                give_back: stage(|stages| stages.give_back).unwrap_or_default(),
            }),
            bits_per_page: median(&|run| run.bits_per_page),
            peak_mib: runs.iter().filter_map(|run| Some(run.peak?.as_mib())).max(),
            throughput: all(&|run| run.throughput),
            stall_ms: all(&|run| run.stall.map(|stall| seconds(stall) * 1e3)),
            device_cpu_s: median(&|run| run.device_cpu.map(seconds)),
            daemon_kib: whole(&|run| Some(run.daemon_memory?.as_bytes() >> 10)),
            machine_ms: all(&|run| run.machine.map(|time| seconds(time) * 1e3)),
            division: runs.iter().find_map(|run| run.division.clone()),
        }
    }

    /// The contestant.
    pub fn contestant(&self) -> Contestant {
        Contestant::new(self.driver, self.device)
    }

    /// By how much longer each run took among `all` than the same run in guests that report free pages, and are not
    /// limited. Those take their memory from the host again, too.
    pub fn waits(&self, all: &[Self]) -> Option<Samples> {
        let is_base = |other: &&Self| other.driver == By::Reporting && other.is_like(self);
        let base = all.iter().find(is_base)?.seconds.values();
        let both = self.seconds.values().iter().zip(base);
        Some(both.map(|(time, base)| time - base).collect())
    }

    /// Whether the subject is the same, except for the driver and the variant.
    fn is_like(&self, other: &Self) -> bool {
        self.name == other.name
            && self.guest_mib == other.guest_mib
            && self.amount_mib == other.amount_mib
            && self.zeroing == other.zeroing
            && self.device == other.device
    }

    /// The baseline among `all`: the same subject with the C driver on the same device, or without a mechanism where
    /// the C driver has none.
    pub fn base<'a>(&self, all: &'a [Self]) -> Option<&'a Self> {
        let is_same = |other: &&Self| other.driver != self.driver && other.is_like(self);
        // A variant without a counterpart is compared with the plain subject.
        let find = |driver: By, detail: &Option<String>| {
            let is_it = |other: &&Self| other.driver == driver && other.detail == *detail;
            all.iter().filter(is_same).find(is_it)
        };
        match self.driver {
            By::C | By::None => None,
            By::Rs | By::VirtioMem | By::Reporting => find(By::C, &self.detail)
                .or_else(|| find(By::C, &None))
                .or_else(|| find(By::None, &None)),
        }
    }
}

/// How often the host's memory is sampled.
const SAMPLING: Duration = Duration::from_millis(1);

/// Runs `work` in a contestant's guest, and measures its costs. `work` returns how long it took.
///
/// # Errors
///
/// The error of `work`, or the guest does not respond.
pub fn measure(
    guest: &Guest,
    contestant: Contestant,
    work: impl FnOnce() -> Result<Duration>,
) -> Result<Run> {
    // A program of the guest counts them, which uses memory.
    let interrupts = guest.interrupts()?;
    let meter = contestant.meter(guest)?;
    let before = meter()?;
    let is_over = AtomicBool::new(false);
    let run = thread::scope(|scope| -> Result<Run> {
        let is_over = &is_over;
        let sampler = scope.spawn(move || -> Result<Size> {
            let mut most = before;
            while !is_over.load(Ordering::Relaxed) {
                most = most.max(meter()?);
                thread::sleep(SAMPLING);
            }
            Ok(most)
        });
        let run = count(guest, work);
        is_over.store(true, Ordering::Relaxed);
        let most = sampler.join().ok().context("the sampler has panicked")??;
        Ok(Run {
            peak: Some(most.saturating_sub(before)),
            ..run?
        })
    })?;
    let interrupts = guest.interrupts()?.saturating_sub(interrupts);
    Ok(Run {
        interrupts: Some(interrupts),
        ..run
    })
}

/// Runs `work`, and counts messages and the time of processors.
fn count(guest: &Guest, work: impl FnOnce() -> Result<Duration>) -> Result<Run> {
    // Only this repository's device has counters.
    let sent = || guest.sent().ok();
    let (sent_before, guest_before) = (sent(), guest.guest_cpu_time()?);
    let (host_before, device_before) = (guest.host_cpu_time()?, guest.device_cpu_time()?);
    let took = work()?;
    let device_cpu = guest.device_cpu_time()?.saturating_sub(device_before);
    let host_cpu = guest.host_cpu_time()?.saturating_sub(host_before);
    let guest_cpu = guest.guest_cpu_time()?.saturating_sub(guest_before);
    Ok(Run {
        took,
        sent: sent()
            .zip(sent_before)
            .map(|(now, before)| now.since(&before)),
        host_cpu: Some(host_cpu),
        guest_cpu: Some(guest_cpu),
        device_cpu: Some(device_cpu),
        ..Run::default()
    })
}
