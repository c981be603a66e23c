// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose kernel zeroes all memory that it allocates (`init_on_alloc=1`), as those of many distributions do.

use anyhow::Result;
use vm::{Config, Guest, Kernel, Load, Size};

use crate::bench::{Bench, Benchmark};
use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Subject, measure_peak};

pub(crate) const IDLE: Benchmark = Benchmark {
    names: &["inflate-zeroing", "deflate-zeroing"],
    kernel: Kernel::Test,
    answers: "Time to inflate and to deflate by 7 of 8 GiB in an idle guest whose kernel zeroes what it allocates \
              (`init_on_alloc=1`), and how much more memory than before the host needs on the way.",
    run: |bench| {
        let contestants = [&Contestant::BALLOONS[..], &[Contestant::VIRTIO_MEM]].concat();
        inflate_and_deflate(bench, IDLE.names, &config(bench), &contestants)
    },
    claims: |records| claims(records, IDLE.names),
};

pub(crate) const DEBIAN: Benchmark = Benchmark {
    names: &["inflate-debian", "deflate-debian"],
    kernel: Kernel::Debian,
    answers: "The same with Debian's own kernel, with the driver of the package, and with the kernel's defaults: it \
              zeroes what it allocates.",
    run: |bench| {
        let config = bench.config().using_memory().memory(MEMORY).zeroing(true);
        inflate_and_deflate(bench, DEBIAN.names, &config, &Contestant::BALLOONS)
    },
    claims: |records| claims(records, DEBIAN.names),
};

pub(crate) const IN_USE: Benchmark = Benchmark {
    names: &["inflate-zeroing-in-use"],
    kernel: Kernel::Test,
    answers: "Time to inflate by 3 of 8 GiB with such a kernel, where half of the memory is in use: data of processes, \
              page cache, and small files as after a build.",
    run: in_use,
    claims: in_use_claims,
};

pub(crate) const FRAGMENTED: Benchmark = Benchmark {
    names: &["inflate-zeroing-fragmented"],
    kernel: Kernel::Test,
    answers: "Time to inflate by 3 of 8 GiB with such a kernel, where only isolated pages of 4 KiB are free, without and \
              with memory blocks.",
    run: fragmented,
    claims: fragmented_claims,
};

const MEMORY: Size = Size::gib(8);
const RUNS: usize = 3;

/// The number of runs of slow configurations.
const FEWER_RUNS: usize = 2;

/// How much more of the host's memory the guest may use while it inflates, in MiB.
const MOST_MORE: f64 = 32.0;

/// The driver without memory blocks.
const PAGES_ONLY: &str = "pages only";

fn config(bench: &Bench<'_>) -> Config {
    let config = bench.config().using_memory().memory(MEMORY);
    config.zeroing(true).parameter("init_on_alloc=1")
}

/// Measures `contestants` in guests of `config`, for the records with these `names`.
fn inflate_and_deflate(
    bench: &Bench<'_>,
    names: &[&'static str],
    config: &Config,
    contestants: &[Contestant],
) -> Result<()> {
    const AMOUNT: Size = Size::gib(7);
    bench.rounds(&[(RUNS, contestants)], |contestant| {
        let subject = |name| Subject::new(name, contestant, MEMORY, AMOUNT);
        contestant.run(config.clone(), AMOUNT, |guest| {
            let inflate = measure_peak(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
            bench.add(subject(names[0]), inflate);
            let deflate = measure_peak(guest, contestant, || contestant.deflate(guest, AMOUNT))?;
            bench.add(subject(names[1]), deflate);
            Ok(())
        })
    })
}

fn claims(records: &[Record], names: &[&str]) -> Vec<Claim> {
    let (ours, on_qemu) = (Contestant::OURS, Contestant::ON_QEMU[0]);
    let ratios = [
        (names[0], ours, 1.0 / 50.0),
        (names[1], ours, 1.0 / 30.0),
        (names[0], on_qemu, 1.0 / 5.0),
    ];
    let peaks = [ours, on_qemu]
        .into_iter()
        .filter_map(|contestant| Claim::peak(records, names[0], contestant, MOST_MORE));
    ratios
        .into_iter()
        .filter_map(|(name, of, limit)| Claim::ratio(records, name, of, of.base(), limit))
        .chain(peaks)
        .collect()
}

/// Makes a guest use half of its memory.
fn use_half(guest: &Guest) -> Result<vm::RunningLoad<'_>> {
    guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
    // Files of the size of compiler output, each with an inode and a name. Half of them are removed
    // again.
    guest.sh(
        "mkdir /objects && cd /objects && dd if=/dev/urandom of=object bs=16k count=1 2>/dev/null
         for d in $(seq 200); do
             mkdir $d; for f in 0 1 2 3 4 5 6 7 8 9; do cp object $d/$f$f; cp object $d/$f; done
         done
         for d in $(seq 200); do rm $d/??; done",
    )?;
    guest.sh("dd if=/dev/zero of=/library bs=1M count=1024 2>/dev/null")?;
    guest.load(Load::Hold {
        mib: 3072,
        threads: 2,
    })
}

fn in_use(bench: &Bench<'_>) -> Result<()> {
    const AMOUNT: Size = Size::gib(3);
    bench.rounds(&[(FEWER_RUNS, &Contestant::BALLOONS)], |contestant| {
        contestant.run(config(bench), AMOUNT, |guest| {
            let load = use_half(guest)?;
            let run = measure_peak(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
            bench.add(
                Subject::new(IN_USE.names[0], contestant, MEMORY, AMOUNT),
                run,
            );
            load.stop()?;
            Ok(())
        })
    })
}

fn in_use_claims(records: &[Record]) -> Vec<Claim> {
    let ours = Contestant::OURS;
    Claim::ratio(records, IN_USE.names[0], ours, ours.base(), 1.0 / 3.0)
        .into_iter()
        .chain(Claim::peak(records, IN_USE.names[0], ours, MOST_MORE))
        .collect()
}

fn fragmented(bench: &Bench<'_>) -> Result<()> {
    const AMOUNT: Size = Size::gib(3);
    let ours = Contestant::OURS;
    bench.rounds(&[(RUNS, &[ours])], |contestant| {
        for (parameters, detail) in [(&[][..], None), (&["memory_blocks=0"], Some(PAGES_ONLY))] {
            vm::run(&contestant.config(config(bench), AMOUNT), |guest| {
                let load = guest.fragment()?;
                let driver = vm::Driver::Rust;
                guest.insmod(driver, &[driver.low_floor(), parameters].concat())?;
                let run = measure_peak(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
                let subject = Subject::new(FRAGMENTED.names[0], contestant, MEMORY, AMOUNT);
                bench.add(
                    match detail {
                        Some(detail) => subject.detail(detail),
                        None => subject,
                    },
                    run,
                );
                load.stop()?;
                Ok(())
            })?;
        }
        Ok(())
    })
}

fn fragmented_claims(records: &[Record]) -> Vec<Claim> {
    Claim::ratio_to_detail(
        records,
        FRAGMENTED.names[0],
        Contestant::OURS,
        PAGES_ONLY,
        1.05,
    )
    .into_iter()
    .collect()
}
