// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that have used their memory: the host has to free it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vm::{Config, Guest, Kernel, Load, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::{Claim, times};
use crate::contestant::{By, Contestant, Device};
use crate::record::{Record, Run, Subject, measure};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["inflate-touched", "deflate-touched"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(2, peaks)],
    by_default: true,
    answers: "Time to inflate and to deflate by 4 of 8 GiB that the guest has used, so that the host has to free them.",
    run,
};

const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(4);
const RUNS: usize = 3;

/// The number of runs of configurations without a claim.
const FEWER_RUNS: usize = 2;

/// How much of the returned memory the host may miss.
const TOLERANCE: Size = Size::mib(512);

/// How long the host may have to wait for free page reporting.
const PATIENCE: Duration = Duration::from_secs(120);

/// One fallocate() over memory of the same kind, which destroys the guest.
const ONE_HOLE: Contestant = Contestant::none(Device::VhostUser);

fn run(bench: &Bench<'_>) -> Result<()> {
    let others = [
        &Contestant::ON_QEMU[..],
        &[Contestant::VIRTIO_MEM, Contestant::REPORTING],
    ]
    .concat();
    let ours = Contestant::OURS;
    let groups: [(_, &[_]); 2] = [
        (RUNS, &[ours, ours.base(), ONE_HOLE]),
        (FEWER_RUNS, &others),
    ];
    bench.rounds(&groups, |contestant| {
        let config = bench.config().memory(MEMORY);
        let subject = |name| Subject::new(name, contestant, MEMORY, AMOUNT);
        match contestant.driver {
            By::None => {
                let took = one_hole(config)?;
                let run = Run {
                    took,
                    ..Run::default()
                };
                bench.add(subject("inflate-touched").detail("one hole"), run);
                Ok(())
            }
            By::Reporting => contestant.run(config, AMOUNT, |guest| {
                bench.add(subject("inflate-touched"), report(guest)?);
                Ok(())
            }),
            By::Rs | By::C | By::VirtioMem => contestant.run(config, AMOUNT, |guest| {
                use_memory(guest, AMOUNT)?;
                let before = contestant.host_memory(guest)?;
                let inflate = measure(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
                let given_back = before.saturating_sub(contestant.host_memory(guest)?);
                ensure!(
                    given_back + TOLERANCE > AMOUNT,
                    "the host got {given_back} of {AMOUNT}"
                );
                bench.add(subject("inflate-touched"), inflate);
                let deflate = measure(guest, contestant, || contestant.deflate(guest, AMOUNT))?;
                bench.add(subject("deflate-touched"), deflate);
                Ok(())
            }),
        }
    })
}

/// Makes the guest use `amount` of its memory and free it again. Page faults for small pages would take 15 s under
/// emulation.
pub(crate) fn use_memory(guest: &Guest, amount: Size) -> Result<()> {
    guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
    guest.touch(amount)
}

/// Makes the guest use its memory and free it again, and waits until the host has it.
fn report(guest: &Guest) -> Result<Run> {
    guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
    let idle = guest.resident()?;
    let mib = usize::try_from(AMOUNT.as_mib())?;
    let load = guest.start_load(Load::Hog { mib })?;
    guest.wait_until("a process has its memory", PATIENCE, || {
        Ok(load.status()?.progress.mib >= mib)
    })?;
    measure(guest, Contestant::REPORTING, || {
        load.stop()?;
        let start = Instant::now();
        guest.wait_until("the host gets the free memory", PATIENCE, || {
            Ok(guest.resident()? < idle + TOLERANCE)
        })?;
        Ok(start.elapsed())
    })
}

/// Punches a hole into the memory of a guest that has used it. Returns the time, scaled to the
/// amount.
fn one_hole(config: Config) -> Result<Duration> {
    let config = ONE_HOLE.config(config, AMOUNT);
    vm::run_and_kill(&config, |guest| {
        use_memory(guest, AMOUNT)?;
        guest.qmp().execute::<Value>("stop", &json!({}))?;
        // The guest has completed its work by then.
        thread::sleep(Duration::from_millis(100));
        let file = guest.memory_file()?;
        let before = file.resident()?;
        let took = file.punch()?;
        let punched = before.saturating_sub(file.resident()?);
        Ok(took.mul_f64(AMOUNT.as_bytes() as f64 / punched.as_bytes() as f64))
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let hole = records
        .iter()
        .find(|record| record.name == "inflate-touched" && record.driver == By::None);
    let ours = times(records, "inflate-touched", Contestant::OURS);
    ours.zip(hole)
        .map(|(ours, hole)| {
            let what = "inflate-touched: time / time of punching one hole of that size";
            Claim::new(what, ours.ratio(&hole.seconds), 1.2)
        })
        .into_iter()
        .chain(peaks(records))
        .collect()
}

fn peaks(records: &[Record]) -> Vec<Claim> {
    Claim::peaks(records, BENCHMARK.names).collect()
}
