// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of all sizes.

use anyhow::Result;
use vm::{Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Run, Subject, measure};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["inflate-scale"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(2, no_claims)],
    by_default: true,
    answers: "Time to inflate by seven eighths of an idle guest's memory, by the size of the guest.",
    run,
};

const NAME: &str = "inflate-scale";
const RUNS: usize = 5;

/// The runs of the C driver, which have no claim and take longest.
const C_RUNS: usize = 2;

/// The sizes of the guests, in GiB. In the largest ones the C driver would take minutes, and so would zeroing.
const SIZES: [u64; 7] = [1, 2, 4, 8, 16, 64, 256];
const LARGE: Size = Size::gib(64);

/// A guest large enough that the fixed cost of a guest does not matter, in MiB.
const REFERENCE: u64 = 8192;

/// The limit of the costs of a GiB, relative to those of the reference.
const COST_LIMIT: f64 = 1.15;

/// A cost, if it was measured.
type Cost = fn(&Record) -> Option<f64>;

/// The costs that have this limit.
const COSTS: [(&str, Cost); 3] = [
    ("time", |record| Some(record.seconds.median())),
    ("the daemon's CPU time", |record| record.device_cpu_s),
    ("the daemon's memory", |record| {
        Some(record.daemon_kib? as f64)
    }),
];

/// The limit of the bytes that a large guest sends for 64 MiB.
const BYTES_LIMIT: f64 = 1.0;

fn run(bench: &Bench<'_>) -> Result<()> {
    let ours = Contestant::OURS;
    let groups: [(_, &[_]); 2] = [(RUNS, &[ours]), (C_RUNS, &[ours.base()])];
    bench.rounds(&groups, |contestant| {
        let is_fast = contestant == ours && !bench.is_zeroing();
        let takes_seconds = |&memory: &Size| is_fast || memory < LARGE;
        for memory in SIZES.map(Size::gib).into_iter().filter(takes_seconds) {
            // The kernel itself needs some of the smallest guest's memory.
            let amount = memory - Size::bytes(memory.as_bytes() / 8).max(Size::mib(256));
            let config = bench.config().memory(memory);
            contestant.run(config, amount, |guest| {
                let daemon = guest.daemon()?;
                let before = daemon.thread_time()?;
                let run = measure(guest, contestant, || contestant.inflate(guest, amount))?;
                let run = Run {
                    device_cpu: Some(daemon.thread_time()?.saturating_sub(before)),
                    daemon_memory: Some(daemon.memory()?),
                    ..run
                };
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
    let Some(reference) = ours().find(|record| record.guest_mib == REFERENCE) else {
        return Vec::new();
    };
    let costs = ours()
        .filter(|record| record.guest_mib > REFERENCE)
        .flat_map(|record| {
            COSTS.iter().filter_map(move |(name, cost)| {
                let per_gib = |record: &Record| Some(cost(record)? / record.amount_mib as f64);
                let (memory, of) = (Size::mib(record.guest_mib), Size::mib(REFERENCE));
                let what = format!("{NAME}: {name} per GiB of {memory} / of {of}");
                let ratio = per_gib(record)? / per_gib(reference)?;
                Some(Claim::new(what, ratio, COST_LIMIT))
            })
        });
    let bytes = ours()
        .filter(|record| record.guest_mib >= LARGE.as_mib())
        .filter_map(|record| {
            let what = format!(
                "inflate-scale: bytes sent for 64 MiB of {}",
                Size::mib(record.guest_mib)
            );
            let portions = record.amount_mib as f64 / 64.0;
            Some(Claim::new(
                what,
                record.wire_bytes? as f64 / portions,
                BYTES_LIMIT,
            ))
        });
    costs.chain(bytes).collect()
}
