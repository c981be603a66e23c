// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Unused memory that the host takes without a balloon (`reclaim`).

use std::time::Instant;

use anyhow::{Result, ensure};
use vm::{Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::{Claim, times};
use crate::contestant::Contestant;
use crate::record::{Record, Subject, measure};
use crate::touched::use_memory;

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &[NAME],
    kernel: Kernel::Test,
    settings: &[Setting::plain(peaks), Setting::zeroing(RUNS, claims)],
    by_default: true,
    answers: "Time of `reclaim` in a guest of 8 GiB that has written and freed 6.7 GiB.",
    run,
};

const NAME: &str = "reclaim";
const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::mib(6860);
const RUNS: usize = 3;

/// How much of it the host may miss.
const TOLERANCE: Size = Size::mib(512);

/// The limit of the time with a kernel that zeroes memory, in seconds.
const LIMIT: f64 = 2.0;

fn run(bench: &Bench<'_>) -> Result<()> {
    let ours = Contestant::OURS;
    bench.rounds(&[(RUNS, &[ours])], |_| {
        ours.run(bench.config().memory(MEMORY), AMOUNT, |guest| {
            use_memory(guest, AMOUNT)?;
            let (daemon, before) = (guest.daemon()?, ours.host_memory(guest)?);
            let run = measure(guest, ours, || {
                let start = Instant::now();
                guest.reclaim_with(&daemon)?;
                Ok(start.elapsed())
            })?;
            let given_back = before.saturating_sub(ours.host_memory(guest)?);
            ensure!(
                given_back + TOLERANCE > AMOUNT,
                "the host got {given_back} of {AMOUNT}"
            );
            bench.add(Subject::new(NAME, ours, MEMORY, AMOUNT), run);
            Ok(())
        })
    })
}

fn peaks(records: &[Record]) -> Vec<Claim> {
    Claim::peaks(records, BENCHMARK.names).collect()
}

fn claims(records: &[Record]) -> Vec<Claim> {
    times(records, NAME, Contestant::OURS)
        .map(|times| Claim::new("reclaim: seconds", times.median(), LIMIT))
        .into_iter()
        .chain(peaks(records))
        .collect()
}
