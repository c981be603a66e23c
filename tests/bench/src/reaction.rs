// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How soon a new target has an effect, at the host and in the guest.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vm::{Guest, Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::claim::{Claim, times};
use crate::contestant::Contestant;
use crate::record::{Record, Run, Subject};
use crate::touched::use_memory;

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["react-inflate", "react-deflate"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(3, no_claims)],
    by_default: true,
    answers: "200 changes of the target by 256 MiB at the control socket. `react-inflate`: time until the host has the first \
              memory back, which the guest has used. `react-deflate`: time until all 256 MiB are free in the guest.",
    run,
};

const MEMORY: Size = Size::gib(6);
const STEP: Size = Size::mib(256);

/// The memory that the guest has not used: less than a step, since with `init_on_alloc=1` the driver may take any.
const UNUSED: Size = Size::mib(192);

/// The changes in each direction in one guest, and the number of guests: 200 changes in all.
const STEPS: u64 = 20;
const RUNS: usize = 10;

/// The number of guests whose driver is traced.
const TRACED_RUNS: usize = 1;

/// The records of the time that the driver's tasks run on the guest's processors.
const OWN_WORK: &str = "own work";

/// The limit for the slowest of a hundred changes, relative to the driver's own work.
const LIMIT: f64 = 10.0;

/// The time between two changes: the daemon interrupts the guest for targets every 10 ms at most.
const PAUSE: Duration = Duration::from_millis(50);

/// The time between two looks at the host's memory.
const INTERVAL: Duration = Duration::from_micros(50);

/// The free memory that other programs of the guest may use during a change.
const TOLERANCE: Size = Size::mib(8);

/// How long a change may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn run(bench: &Bench<'_>) -> Result<()> {
    let (ours, highest) = (Contestant::OURS, STEP * STEPS);
    let contestants = [ours, ours.base()];
    bench.rounds(&[(RUNS, &contestants)], |contestant| {
        contestant.run(bench.config().memory(MEMORY), highest, |guest| {
            use_memory(guest, guest.free()?.saturating_sub(UNUSED))?;
            let add = |name, took| {
                let run = Run {
                    took,
                    ..Run::default()
                };
                bench.add(Subject::new(name, contestant, MEMORY, STEP), run);
            };
            for step in 1..=STEPS {
                add("react-inflate", inflate(guest, STEP * step)?);
            }
            for step in (0..STEPS).rev() {
                add("react-deflate", deflate(guest, STEP * step)?);
            }
            Ok(())
        })
    })?;
    // In guests of their own, since tracing costs time.
    bench.rounds(&[(TRACED_RUNS, &contestants)], |contestant| {
        contestant.run(bench.config().memory(MEMORY), highest, |guest| {
            let driver = contestant.module().context("a balloon has a driver")?;
            let up = (1..=STEPS).map(|step| ("react-inflate", step));
            let down = (0..STEPS).rev().map(|step| ("react-deflate", step));
            for (name, step) in up.chain(down) {
                let (_, took) =
                    guest.trace_running(driver, || guest.balloon().settle(STEP * step))?;
                let subject = Subject::new(name, contestant, MEMORY, STEP);
                bench.add(
                    subject.detail(OWN_WORK),
                    Run {
                        took,
                        ..Run::default()
                    },
                );
            }
            Ok(())
        })
    })
}

/// Inflates to `target`. Returns how long it took until the host had the first memory back.
fn inflate(guest: &Guest, target: Size) -> Result<Duration> {
    thread::sleep(PAUSE);
    let file = guest.memory_file()?;
    let before = file.resident()?;
    let start = Instant::now();
    guest.balloon().request(target)?;
    while file.resident()? >= before {
        ensure!(start.elapsed() < PATIENCE, "the host got no memory back");
        thread::sleep(INTERVAL);
    }
    let took = start.elapsed();
    guest.balloon().reach(target)?;
    Ok(took)
}

/// Deflates to `target`. Returns how long it took until all of the memory was free in the guest.
fn deflate(guest: &Guest, target: Size) -> Result<Duration> {
    thread::sleep(PAUSE);
    // The C driver's pages stay on the per-CPU page lists for a while.
    let before = guest.free()?;
    let wanted = before + STEP.saturating_sub(TOLERANCE);
    let start = Instant::now();
    guest.balloon().request(target)?;
    loop {
        let free = guest.free()?;
        if free >= wanted {
            break;
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "on the way to {target}, {before} of memory were free, and then {free}"
        );
    }
    let took = start.elapsed();
    guest.balloon().reach(target)?;
    Ok(took)
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let claim = |name| {
        let own = |record: &&Record| {
            record.name == name
                && record.contestant() == Contestant::OURS
                && record.detail.as_deref() == Some(OWN_WORK)
        };
        let all = times(records, name, Contestant::OURS)?;
        let own = records.iter().find(own)?.seconds.median();
        let what =
            format!("{name}: 99 % of the times are within so many times the driver's own work");
        Some(Claim::new(what, all.percentile(99) / own, LIMIT))
    };
    BENCHMARK.names.iter().copied().filter_map(claim).collect()
}
