// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that have not used their memory yet, and the stages of inflating in them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vm::{Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::{Claim, variant};
use crate::contestant::{By, Contestant, Device};
use crate::record::{Record, Run, Stages, Subject, measure};
use crate::touched::use_memory;

pub(crate) const IDLE: Benchmark = Benchmark {
    names: &["inflate-idle", "deflate-idle"],
    kernel: Kernel::Test,
    settings: &[
        Setting::plain(claims),
        Setting::zeroing(ZEROING_RUNS, |records| zeroing_claims(records, IDLE.names)),
    ],
    by_default: true,
    answers: "Time to inflate and to deflate by 7 of 8 GiB, in an idle guest that has not used them.",
    run,
};

pub(crate) const DEBIAN: Benchmark = Benchmark {
    names: &["inflate-debian", "deflate-debian"],
    kernel: Kernel::Debian,
    settings: &[Setting::own(|records| {
        zeroing_claims(records, DEBIAN.names)
    })],
    by_default: true,
    answers: "The same with Debian's own kernel, with the driver of the package, and with the kernel's defaults: it \
              zeroes what it allocates.",
    run: |bench| {
        let contestants = [&Contestant::BALLOONS[..], &[Contestant::VIRTIO_MEM]].concat();
        inflate_and_deflate(bench, DEBIAN.names, &[(ZEROING_RUNS, &contestants)])
    },
};

const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(7);
const RUNS: usize = 5;

/// The number of runs of configurations without a claim.
const FEWER_RUNS: usize = 3;

/// The number of runs with a kernel that zeroes memory.
const ZEROING_RUNS: usize = 3;

/// The number of runs that measure the stages.
const TRACED_RUNS: usize = 3;

/// The driver without memory blocks, in a guest with one processor.
const PAGES_ONLY: &str = "pages only, one processor";

/// A process that uses as much memory in such a guest. The kernel zeroes each huge page once.
const PROCESS: Contestant = Contestant::none(Device::VhostUser);
const ONE_PASS: &str = "one pass of zeroing, one processor";

/// The length of a page frame number of the base protocol, in bytes.
const PFN_BYTES: u64 = 4;

fn run(bench: &Bench<'_>) -> Result<()> {
    let ours = Contestant::OURS;
    let groups: [(_, &[_]); 2] = [
        (RUNS, &[ours, ours.base(), Contestant::VIRTIO_MEM]),
        (FEWER_RUNS, &Contestant::ON_QEMU),
    ];
    inflate_and_deflate(bench, IDLE.names, &groups)?;
    zero(bench)?;
    // In guests of their own, since tracing costs time.
    let traced = [By::Rs, By::C].map(|driver| Contestant::new(driver, Device::VhostUser));
    bench.rounds(&[(TRACED_RUNS, &traced)], |contestant| {
        contestant.run(bench.config().memory(MEMORY), AMOUNT, |guest| {
            let driver = contestant.module().context("a balloon has a driver")?;
            let before = guest.daemon()?.info()?.counters;
            let (took, allocate) =
                guest.trace_running(driver, || contestant.inflate(guest, AMOUNT))?;
            let now = guest.daemon()?.info()?.counters;
            let translate = Duration::from_micros(now.translating - before.translating);
            let give_back = Duration::from_micros(now.discarding - before.discarding);
            let send = took.saturating_sub(allocate + translate + give_back);
            let [allocate, send, translate, give_back] =
                [allocate, send, translate, give_back].map(|time| time.as_secs_f64());
            let run = Run {
                took,
                stages: Some(Stages {
                    allocate,
                    send,
                    translate,
                    give_back,
                }),
                ..Run::default()
            };
            let subject = Subject::new("inflate-idle", contestant, MEMORY, AMOUNT);
            bench.add(subject.detail("traced"), run);
            Ok(())
        })
    })
}

/// Measures how long it takes to zero the memory, in a kernel that does so: for a balloon without memory blocks, and for
/// a process. The process would zero on all processors, and the driver zeroes on one.
fn zero(bench: &Bench<'_>) -> Result<()> {
    let contestants = [Contestant::OURS, PROCESS];
    bench.rounds(&[(ZEROING_RUNS, &contestants)], |contestant| {
        if !bench.is_zeroing() {
            return Ok(());
        }
        let config = contestant.config(bench.config().memory(MEMORY).cpus(1), AMOUNT);
        vm::run(&config, |guest| {
            contestant.load(guest, &["memory_blocks=0"])?;
            let (detail, run) = match contestant {
                PROCESS => (
                    ONE_PASS,
                    measure(guest, contestant, || {
                        let start = Instant::now();
                        use_memory(guest, AMOUNT)?;
                        Ok(start.elapsed())
                    })?,
                ),
                _ => (
                    PAGES_ONLY,
                    measure(guest, contestant, || contestant.inflate(guest, AMOUNT))?,
                ),
            };
            let subject = Subject::new("inflate-idle", contestant, MEMORY, AMOUNT);
            bench.add(subject.detail(detail), run);
            Ok(())
        })
    })
}

/// Measures inflating and deflating, for the records with these `names`.
fn inflate_and_deflate(
    bench: &Bench<'_>,
    names: &[&'static str],
    groups: &[(usize, &[Contestant])],
) -> Result<()> {
    bench.rounds(groups, |contestant| {
        let subject = |name| Subject::new(name, contestant, MEMORY, AMOUNT);
        contestant.run(bench.config().memory(MEMORY), AMOUNT, |guest| {
            let inflate = measure(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
            bench.add(subject(names[0]), inflate);
            let deflate = measure(guest, contestant, || contestant.deflate(guest, AMOUNT))?;
            bench.add(subject(names[1]), deflate);
            Ok(())
        })
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    let (ours, on_qemu) = (Contestant::OURS, Contestant::ON_QEMU[0]);
    let ratios = [
        ("inflate-idle", ours, ours.base(), 1.0 / 200.0),
        ("inflate-idle", ours, Contestant::VIRTIO_MEM, 1.0 / 17.0),
        ("deflate-idle", ours, ours.base(), 0.01),
        ("inflate-idle", on_qemu, Contestant::STOCK, 0.22),
        ("deflate-idle", on_qemu, Contestant::STOCK, 0.5),
        ("inflate-idle", ours.base(), Contestant::STOCK, 1.1),
    ];
    let bytes = records
        .iter()
        .find(|record| record.name == "inflate-idle" && record.contestant() == ours)
        .and_then(|record| record.wire_bytes)
        .map(|bytes| {
            let array = (AMOUNT.as_pages() * PFN_BYTES) as f64;
            let what = "inflate-idle: bytes sent / bytes of an array of page frame numbers";
            Claim::new(what, bytes as f64 / array, 0.001)
        });
    ratios
        .into_iter()
        .filter_map(|(name, of, to, limit)| Claim::ratio(records, name, of, to, limit))
        .chain(bytes)
        .chain(Claim::peaks(records, IDLE.names))
        .collect()
}

/// The claims about a kernel that zeroes memory.
fn zeroing_claims(records: &[Record], names: &[&str]) -> Vec<Claim> {
    let (ours, on_qemu) = (Contestant::OURS, Contestant::ON_QEMU[0]);
    let ratios = [
        (names[0], ours, 1.0 / 50.0),
        (names[1], ours, 1.0 / 30.0),
        (names[0], on_qemu, 1.0 / 5.0),
    ];
    ratios
        .into_iter()
        .filter_map(|(name, of, limit)| Claim::ratio(records, name, of, of.base(), limit))
        .chain(one_pass(records))
        .chain(Claim::peaks(records, names))
        .collect()
}

/// The claim that a balloon which cannot avoid zeroing needs hardly longer than that.
fn one_pass(records: &[Record]) -> Option<Claim> {
    let time = |of, detail| Some(&variant(records, "inflate-idle", of, detail)?.seconds);
    let ratio = time(Contestant::OURS, PAGES_ONLY)?.ratio(time(PROCESS, ONE_PASS)?);
    let what = format!(
        "inflate-idle: time of {}, {PAGES_ONLY} / {ONE_PASS}",
        Contestant::OURS
    );
    Some(Claim::new(what, ratio, 1.05))
}
