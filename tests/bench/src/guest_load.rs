// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The effect of what a guest does for the host on the guest's other processes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vm::{Guest, Kernel, Load, Offer, RunningLoad, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::claim::Claim;
use crate::contestant::{Contestant, Device};
use crate::record::{Record, Run, Subject};
use crate::touched::use_memory;

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &[NAME],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(1, no_claims)],
    by_default: true,
    answers: "Throughput of a load that keeps all processors busy, and the longest stall of a 1 kHz task, while the \
              guest does something for the host (`variant`), and for half a second at least. `reclaim` returns all unused \
              memory of a guest that has used 1 GiB: virtio-mem unplugs 7 of 8 GiB for it. `reports` returns that 1 GiB.",
    run,
};

const NAME: &str = "guest-load";
const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(1);

/// What virtio-mem can unplug if the host wants all unused memory.
const ALL: Size = Size::gib(7);

/// How often a guest does each work, if there is a claim about it and otherwise.
const REPETITIONS: usize = 20;
const FEWER_REPETITIONS: usize = 3;

/// The contestants that the claims compare, with a kernel that does not zero memory.
const COMPARED: [Contestant; 5] = [
    Contestant::OURS,
    Contestant::VIRTIO_MEM,
    Contestant::REPORTING,
    Contestant::ON_QEMU[0],
    Contestant::ON_QEMU[1],
];

/// The polling interval for all devices: to look takes time of the host's processors.
const POLLING: Duration = Duration::from_millis(20);

/// How long the load is measured before each work, and during it at least.
const BEFORE: Duration = Duration::from_millis(300);
const WINDOW: Duration = Duration::from_millis(500);

/// How long the host may have to wait for free page reporting.
const PATIENCE: Duration = Duration::from_secs(120);

/// The load, which keeps both of the guest's processors busy.
const LOAD: Load = Load::Compute { threads: 2 };

/// The limits for the longest stall: on QEMU's device relative to the C driver, and on this repository's device
/// relative to what does the same on QEMU's.
const LIMIT_ON_QEMU: f64 = 1.5;
const LIMIT: f64 = 1.2;

/// A guest that does nothing for the host.
const IDLE: Contestant = Contestant::none(Device::Qemu);

/// What a guest does for the host.
#[derive(Clone, Copy, Debug)]
enum Work {
    Nothing,
    Inflate,
    Deflate,
    Reclaim,
    Hints,
    Reports,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Inflate => "inflate",
            Self::Deflate => "deflate",
            Self::Reclaim => "reclaim",
            Self::Hints => "hints",
            Self::Reports => "reports",
        }
    }

    /// Gives the guest the memory that it is about to give away.
    fn prepare(self, guest: &Guest, contestant: Contestant) -> Result<()> {
        match self {
            Self::Reclaim => {
                contestant.plug(guest, ALL)?;
                use_memory(guest, AMOUNT)
            }
            Self::Reports => use_memory(guest, AMOUNT),
            Self::Nothing | Self::Inflate | Self::Deflate | Self::Hints => Ok(()),
        }
    }

    /// Does it. Returns how long it took.
    fn perform(self, guest: &Guest, contestant: Contestant) -> Result<Duration> {
        let start = Instant::now();
        match self {
            Self::Nothing => thread::sleep(WINDOW),
            Self::Inflate => return contestant.inflate(guest, AMOUNT),
            Self::Deflate => return contestant.deflate(guest, AMOUNT),
            Self::Reclaim if contestant == Contestant::VIRTIO_MEM => {
                return contestant.inflate(guest, ALL);
            }
            Self::Reclaim => guest.reclaim_with(&*guest.daemon()?)?,
            Self::Hints => guest.hint_with(&*guest.daemon()?)?,
            Self::Reports => {
                let memory = || contestant.host_memory(guest);
                // The guest reports a part of its free memory every two seconds.
                let expected = memory()?.saturating_sub(Size::mib(AMOUNT.as_mib() / 4));
                guest.wait_until("reports", PATIENCE, || Ok(memory()? < expected))?;
            }
        }
        Ok(start.elapsed())
    }
}

fn run(bench: &Bench<'_>) -> Result<()> {
    let contestants = [&Contestant::BALLOONS[..], &[Contestant::VIRTIO_MEM, IDLE]].concat();
    bench.rounds(&[(1, &contestants)], |contestant| {
        let works: &[Work] = match contestant {
            IDLE => &[Work::Nothing],
            Contestant::OURS => &[Work::Inflate, Work::Deflate, Work::Reclaim, Work::Hints],
            _ => &[Work::Inflate, Work::Deflate],
        };
        repeat(bench, contestant, AMOUNT, Offer::FreePageHint, works)
    })?;
    bench.rounds(&[(1, &[Contestant::VIRTIO_MEM])], |contestant| {
        repeat(
            bench,
            contestant,
            ALL,
            Offer::FreePageHint,
            &[Work::Reclaim],
        )
    })?;
    // In guests of their own, since a guest also reports while it does other work.
    let contestants = [Contestant::OURS, Contestant::REPORTING];
    bench.rounds(&[(1, &contestants)], |contestant| {
        repeat(
            bench,
            contestant,
            AMOUNT,
            Offer::FreePageReporting,
            &[Work::Reports],
        )
    })
}

/// Makes one guest, which can return `most`, do all `works` repeatedly. This repository's device makes an `offer` for
/// them.
fn repeat(
    bench: &Bench<'_>,
    contestant: Contestant,
    most: Size,
    offer: Offer,
    works: &[Work],
) -> Result<()> {
    let config = bench.config().memory(MEMORY).polling(POLLING);
    let config = match contestant.device {
        Device::VhostUser => config.offer(&[offer]),
        Device::Qemu => config,
    };
    let repetitions = match COMPARED.contains(&contestant) && !bench.is_zeroing() {
        true => REPETITIONS,
        false => FEWER_REPETITIONS,
    };
    contestant.run(config, most, |guest| {
        let load = guest.load(LOAD)?;
        for _ in 0..repetitions {
            for &work in works {
                work.prepare(guest, contestant)?;
                let run = watch(guest, &load, || work.perform(guest, contestant))?;
                let subject = Subject::new(NAME, contestant, MEMORY, AMOUNT);
                bench.add(subject.detail(work.name()), run);
            }
        }
        load.stop()?;
        Ok(())
    })
}

/// Does `work` while a load runs.
fn watch(
    guest: &Guest,
    load: &RunningLoad<'_>,
    work: impl FnOnce() -> Result<Duration>,
) -> Result<Run> {
    let pace = Pace::start(load)?;
    thread::sleep(BEFORE);
    let before = pace.end()?;
    ensure!(before > 0.0, "the load does nothing");
    let task = guest.load(Load::Tick { microseconds: 1000 })?;
    let pace = Pace::start(load)?;
    let took = work()?;
    thread::sleep(WINDOW.saturating_sub(took));
    let during = pace.end()?;
    let stall = task.stop()?.progress.stall_us;
    Ok(Run {
        took,
        throughput: Some(during / before),
        stall: Some(Duration::from_micros(stall)),
        ..Run::default()
    })
}

/// A measurement of what a load does in a second.
struct Pace<'a> {
    load: &'a RunningLoad<'a>,
    passes: u64,
    start: Instant,
}

impl<'a> Pace<'a> {
    fn start(load: &'a RunningLoad<'a>) -> Result<Self> {
        Ok(Self {
            load,
            passes: load.status()?.progress.passes,
            start: Instant::now(),
        })
    }

    fn end(self) -> Result<f64> {
        let passes = self.load.status()?.progress.passes - self.passes;
        Ok(passes as f64 / self.start.elapsed().as_secs_f64())
    }
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let find = |contestant, work: Work| {
        let is_it = |record: &&Record| {
            record.contestant() == contestant && record.detail.as_deref() == Some(work.name())
        };
        records.iter().find(is_it)
    };
    let stalls = |of: (Contestant, Work), to: (Contestant, Work), limit| {
        let stall = |(contestant, work)| find(contestant, work)?.stall_ms.as_ref();
        let what = format!("{NAME}: longest stall, {} / {}", named(of), named(to));
        Some(Claim::new(what, stall(of)?.ratio(stall(to)?), limit))
    };
    let paces = |of: (Contestant, Work), to: (Contestant, Work)| {
        let pace = |(contestant, work)| find(contestant, work)?.throughput.as_ref();
        let what = format!("{NAME}: load's throughput, {} / {}", named(of), named(to));
        Some(Claim::new(what, pace(of)?.ratio(pace(to)?), 1.0))
    };
    let both = [Work::Inflate, Work::Deflate];
    let on_qemu = both.map(|work| {
        let [ours, stock] = Contestant::ON_QEMU.map(|contestant| (contestant, work));
        stalls(ours, stock, LIMIT_ON_QEMU)
    });
    let all = [
        (Work::Inflate, (Contestant::VIRTIO_MEM, Work::Inflate)),
        (Work::Deflate, (Contestant::VIRTIO_MEM, Work::Deflate)),
        (Work::Reclaim, (Contestant::VIRTIO_MEM, Work::Reclaim)),
        (Work::Hints, (Contestant::VIRTIO_MEM, Work::Inflate)),
        (Work::Reports, (Contestant::REPORTING, Work::Reports)),
    ];
    let ours = all.map(|(ours, other)| {
        let ours = (Contestant::OURS, ours);
        [stalls(ours, other, LIMIT), paces(other, ours)]
    });
    let ours = ours.into_iter().flatten();
    on_qemu.into_iter().chain(ours).flatten().collect()
}

/// A contestant and its work, as text.
fn named((contestant, work): (Contestant, Work)) -> String {
    format!("{} of {contestant}", work.name())
}
