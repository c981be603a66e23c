// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that use half of their memory.

use anyhow::Result;
use vm::{Guest, Kernel, Load, RunningLoad, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Subject, measure};

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &[NAME],
    kernel: Kernel::Test,
    settings: &[
        Setting::plain(claims),
        Setting::zeroing(RUNS, zeroing_claims),
    ],
    by_default: true,
    answers: "Time to inflate by 3 of 8 GiB, where half of the memory is in use: data of processes, page cache, and \
              small files as after a build.",
    run,
};

const NAME: &str = "inflate-in-use";
const MEMORY: Size = Size::gib(8);
const AMOUNT: Size = Size::gib(3);
const RUNS: usize = 2;

fn run(bench: &Bench<'_>) -> Result<()> {
    let contestants = [&Contestant::BALLOONS[..], &[Contestant::VIRTIO_MEM]].concat();
    bench.rounds(&[(RUNS, &contestants)], |contestant| {
        contestant.run(bench.config().memory(MEMORY), AMOUNT, |guest| {
            let load = use_half(guest)?;
            let run = measure(guest, contestant, || contestant.inflate(guest, AMOUNT))?;
            bench.add(Subject::new(NAME, contestant, MEMORY, AMOUNT), run);
            load.stop()?;
            Ok(())
        })
    })
}

/// Makes a guest use half of its memory.
fn use_half(guest: &Guest) -> Result<RunningLoad<'_>> {
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

fn claims(records: &[Record]) -> Vec<Claim> {
    Claim::peaks(records, BENCHMARK.names).collect()
}

fn zeroing_claims(records: &[Record]) -> Vec<Claim> {
    let ours = Contestant::OURS;
    [ours, Contestant::ON_QEMU[0]]
        .into_iter()
        .filter_map(|of| Claim::ratio(records, NAME, of, of.base(), 1.0 / 3.0))
        .chain(claims(records))
        .collect()
}
