// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose free memory is isolated pages.

use anyhow::Result;
use vm::{Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Run, Subject, measure};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &["inflate-fragmented"],
    kernel: Kernel::Test,
    settings: &[
        Setting::plain(claims),
        Setting::zeroing(RUNS, zeroing_claims),
    ],
    by_default: true,
    answers: "Time to inflate by 3 of 8 GiB, where only isolated pages of 4 KiB are free, between pages in use.",
    run,
};

const NAME: &str = "inflate-fragmented";
const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(3);
const RUNS: usize = 3;

/// The number of runs of configurations without a claim.
const FEWER_RUNS: usize = 2;

/// The encodings that the driver's parameter selects. They have no claim, and few runs: fragmenting
/// a guest takes 15 s.
const ENCODINGS: &[(&str, &str)] = &[
    ("encoding=1", "ranges only"),
    ("encoding=2", "bitmaps only"),
    ("encoding=255", "PFNs only"),
];

/// The driver without memory blocks.
const PAGES_ONLY: &str = "pages only";

fn run(bench: &Bench<'_>) -> Result<()> {
    for &(parameter, name) in ENCODINGS {
        bench.rounds(&[(1, &[Contestant::OURS])], |contestant| {
            let run = give(bench, contestant, &[parameter])?;
            bench.add(subject(contestant).detail(name), run);
            Ok(())
        })?;
    }
    let ours = Contestant::OURS;
    let others = [&Contestant::ON_QEMU[..], &[Contestant::VIRTIO_MEM]].concat();
    let groups: [(_, &[_]); 2] = [(RUNS, &[ours, ours.base()]), (FEWER_RUNS, &others)];
    bench.rounds(&groups, |contestant| {
        bench.add(subject(contestant), give(bench, contestant, &[])?);
        if bench.is_zeroing() && contestant == ours {
            let run = give(bench, contestant, &["memory_blocks=0"])?;
            bench.add(subject(contestant).detail(PAGES_ONLY), run);
        }
        Ok(())
    })
}

fn subject(contestant: Contestant) -> Subject {
    Subject::new(NAME, contestant, MEMORY, AMOUNT)
}

/// Inflates in a guest whose free memory is almost all isolated pages. The host provides all of it, since the guest
/// has written to it before.
fn give(bench: &Bench<'_>, contestant: Contestant, parameters: &[&str]) -> Result<Run> {
    let config = contestant.config(bench.config().memory(MEMORY), AMOUNT);
    vm::run(&config, |guest| {
        contestant.plug(guest, AMOUNT)?;
        let load = guest.fragment()?;
        contestant.load(guest, parameters)?;
        let mut run = measure(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
        if let Some(sent) = &run.sent {
            let bits = (sent.bytes * 8) as f64;
            run.bits_per_page = Some(bits / guest.balloon_stretch()? as f64);
        }
        load.stop()?;
        Ok(run)
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let ours = Contestant::OURS;
    let bits = records
        .iter()
        .find(|record| {
            record.name == NAME && record.contestant() == ours && record.detail.is_none()
        })
        .and_then(|record| record.bits_per_page)
        .map(|bits| {
            let what = "inflate-fragmented: bits sent per page of the memory covered";
            Claim::new(what, bits, 1.01)
        });
    Claim::ratio(records, NAME, ours, ours.base(), 0.2)
        .into_iter()
        .chain(bits)
        .chain(Claim::peaks(records, BENCHMARK.names))
        .collect()
}

fn zeroing_claims(records: &[Record]) -> Vec<Claim> {
    let ours = Contestant::OURS;
    Claim::ratio_to_detail(records, NAME, ours, PAGES_ONLY, 1.05)
        .into_iter()
        .chain(Claim::peaks(records, BENCHMARK.names))
        .collect()
}
