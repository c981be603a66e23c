// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration with hints of free memory, on stock QEMU.

use anyhow::Result;
use vm::{Kernel, Offer, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::claim::Claim;
use crate::contestant::{By, Contestant, Device};
use crate::record::{Record, Run, Subject, measure};

pub(crate) const IDLE: Benchmark = Benchmark {
    names: &["migrate-idle"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(no_claims), Setting::zeroing(2, no_claims)],
    by_default: true,
    answers: "Time and copied memory of migrating an idle guest of 8 GiB.",
    run: |bench| run(bench, "migrate-idle", Size::default()),
};

pub(crate) const DIRTY: Benchmark = Benchmark {
    names: &["migrate-dirty"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(2, no_claims)],
    by_default: true,
    answers: "Time and copied memory of migrating a guest of 8 GiB that has written and freed 5 GiB.",
    run: |bench| run(bench, "migrate-dirty", Size::gib(5)),
};

const MEMORY: Size = Size::gib(8);
const RUNS: usize = 3;

/// Without hints, with the C driver's, and with this driver's.
const CONTESTANTS: [Contestant; 3] = [
    Contestant::none(Device::Qemu),
    Contestant::STOCK,
    Contestant::new(By::Rs, Device::Qemu),
];

/// The limit of the time and of the copied memory, relative to the C driver's.
const LIMIT: f64 = 0.5;

/// Measures migrations of freshly booted guests. In a second migration unwritten pages cost QEMU less, since it
/// mapped them when it first read them.
fn run(bench: &Bench<'_>, name: &'static str, written: Size) -> Result<()> {
    bench.rounds(&[(RUNS, &CONTESTANTS)], |contestant| {
        let config = bench.config().memory(MEMORY);
        let config = config.offer(&[Offer::FreePageHint]);
        contestant.run(config, written, |guest| {
            // Under emulation, faulting in this much as small pages takes 15 s.
            guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
            if written > Size::default() {
                guest.touch(written)?;
            }
            let mut sent = Size::default();
            let run = measure(guest, contestant, || {
                let transfer = guest.migrate_to_nowhere()?;
                sent = transfer.sent;
                Ok(transfer.total)
            })?;
            let run = Run {
                transferred: Some(sent),
                ..run
            };
            bench.add(Subject::new(name, contestant, MEMORY, written), run);
            Ok(())
        })
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let [_, c, rust] = CONTESTANTS;
    let ratios = [
        Claim::ratio(records, "migrate-dirty", rust, c, LIMIT),
        Claim::copied(records, "migrate-dirty", rust, c, LIMIT),
    ];
    ratios.into_iter().flatten().collect()
}
