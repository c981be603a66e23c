// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of all sizes.

use anyhow::Result;
use vm::{Kernel, Size};

use crate::bench::{Bench, Benchmark};
use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Subject, measure};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["inflate-scale"],
    kernel: Kernel::Test,
    answers: "Time to inflate by seven eighths of an idle guest's memory, by the size of the guest.",
    run,
    claims,
};

const NAME: &str = "inflate-scale";
const RUNS: usize = 5;

/// The runs of the C driver, which have no claim and take longest.
const C_RUNS: usize = 2;

/// A guest large enough that the fixed cost of a guest does not matter, in MiB.
const REFERENCE: u64 = 4096;

fn run(bench: &Bench<'_>) -> Result<()> {
    let ours = Contestant::OURS;
    let groups: [(_, &[_]); 2] = [(RUNS, &[ours]), (C_RUNS, &[ours.base()])];
    bench.rounds(&groups, |contestant| {
        for memory in [1, 2, 4, 8, 16].map(Size::gib) {
            // The kernel itself needs some of the smallest guest's memory.
            let amount = memory - Size::bytes(memory.as_bytes() / 8).max(Size::mib(256));
            let config = bench.config().memory(memory);
            contestant.run(config, amount, |guest| {
                let run = measure(guest, || contestant.inflate(guest, amount))?;
                bench.add(Subject::new(NAME, contestant, memory, amount), run);
                Ok(())
            })?;
        }
        Ok(())
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let ours = || {
        let ours = |record: &&Record| record.contestant() == Contestant::OURS;
        records.iter().filter(ours)
    };
    let per_gib = |record: &Record| record.seconds.median() / record.amount_mib as f64;
    let Some(reference) = ours().find(|record| record.guest_mib == REFERENCE) else {
        return Vec::new();
    };
    ours()
        .filter(|record| record.guest_mib > REFERENCE)
        .map(|record| {
            let what = format!(
                "inflate-scale: time per GiB of {} / of {}",
                Size::mib(record.guest_mib),
                Size::mib(REFERENCE)
            );
            Claim::new(what, per_gib(record) / per_gib(reference), 1.25)
        })
        .collect()
}
