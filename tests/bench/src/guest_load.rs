// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The effect of inflating on other processes of the guest.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vm::{Guest, Kernel, Load, RunningLoad, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::contestant::{Contestant, Device};
use crate::record::{Run, Subject};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["guest-load"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(no_claims), Setting::zeroing(2, no_claims)],
    answers: "Throughput of a co-running load, and the longest stall of a 1 kHz task, in the 3 s after a 4 GiB inflate request.",
    run,
};

const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(4);
const RUNS: usize = 2;

/// How long the load is measured before the request, and from the request on.
const BEFORE: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(3);

/// The loads, which keep both of the guest's processors busy.
const LOADS: [(&str, Load); 2] = [
    (
        "memory-bound",
        Load::Copy {
            mib: 128,
            threads: 2,
        },
    ),
    ("CPU-bound", Load::Compute { threads: 2 }),
];

fn run(bench: &Bench<'_>) -> Result<()> {
    let contestants = [
        &Contestant::BALLOONS[..],
        &[Contestant::VIRTIO_MEM, Contestant::none(Device::Qemu)],
    ]
    .concat();
    bench.rounds(&[(RUNS, &contestants)], |contestant| {
        contestant.run(bench.config().memory(MEMORY), AMOUNT, |guest| {
            for (detail, load) in LOADS {
                let run = watch(contestant, guest, load)?;
                let subject = Subject::new("guest-load", contestant, MEMORY, AMOUNT);
                bench.add(subject.detail(detail), run);
                if contestant.module().is_some() || contestant == Contestant::VIRTIO_MEM {
                    contestant.deflate(guest, AMOUNT)?;
                }
            }
            Ok(())
        })
    })
}

/// Inflates while a load runs.
fn watch(contestant: Contestant, guest: &Guest, load: Load) -> Result<Run> {
    let load = guest.load(load)?;
    let before = Pace::of(&load, BEFORE)?;
    let task = guest.load(Load::Tick { microseconds: 1000 })?;
    let took = thread::scope(|scope| -> Result<_> {
        let start = Instant::now();
        let giving = (contestant != Contestant::none(Device::Qemu))
            .then(|| scope.spawn(|| contestant.inflate(guest, AMOUNT)));
        let pace = Pace::of(&load, WINDOW.saturating_sub(start.elapsed()))?;
        let stall = task.status()?.progress.stall_us;
        let took = match giving {
            Some(giving) => giving.join().expect("a thread does not panic")?,
            None => WINDOW,
        };
        Ok((took, pace, stall))
    });
    let (took, during, stall) = took?;
    ensure!(before.0 > 0.0, "the load does nothing");
    task.stop()?;
    load.stop()?;
    Ok(Run {
        took,
        throughput: Some(during.0 / before.0),
        stall: Some(Duration::from_micros(stall)),
        ..Run::default()
    })
}

/// What a load does in a second.
struct Pace(f64);

impl Pace {
    /// Measures it for `time`.
    fn of(load: &RunningLoad<'_>, time: Duration) -> Result<Self> {
        let start = Instant::now();
        let before = load.status()?.progress.passes;
        thread::sleep(time);
        let passes = load.status()?.progress.passes - before;
        Ok(Self(passes as f64 / start.elapsed().as_secs_f64()))
    }
}
