// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots, with and without the guest's unused memory (docs/snapshots.md).

use std::time::Instant;

use anyhow::Result;
use vm::{Driver, Kernel, Size};

use crate::bench::{Bench, Benchmark, Setting, no_claims};
use crate::claim::Claim;
use crate::contestant::{Contestant, Device};
use crate::record::{Record, Run, Subject};

pub(crate) const IDLE: Benchmark = Benchmark {
    names: &["snapshot-idle"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(no_claims), Setting::zeroing(2, no_claims)],
    by_default: true,
    answers: "Time and size of a snapshot of an idle guest of 8 GiB, without and with `reclaim` before it.",
    run: |bench| run(bench, "snapshot-idle", Size::default()),
};

pub(crate) const DIRTY: Benchmark = Benchmark {
    names: &["snapshot-dirty"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(claims), Setting::zeroing(2, no_claims)],
    by_default: true,
    answers: "Time and size of a snapshot of a guest of 8 GiB that has written and freed 5 GiB, without and with \
              `reclaim` before it.",
    run: |bench| run(bench, "snapshot-dirty", Size::gib(5)),
};

const MEMORY: Size = Size::gib(8);
const RUNS: usize = 3;

/// The directory of guests' memory and snapshots, a tmpfs.
const DIRECTORY: &str = "/dev/shm";

const AS_IT_IS: Contestant = Contestant::none(Device::VhostUser);

fn run(bench: &Bench<'_>, name: &'static str, written: Size) -> Result<()> {
    // Both snapshots are of the same guest. The guest has a balloon device for the second one only.
    bench.rounds(&[(RUNS, &[AS_IT_IS])], |_| {
        let directory = tempfile::tempdir_in(DIRECTORY)?;
        let config = bench.config().memory(MEMORY);
        let config = AS_IT_IS
            .config(config, written)
            .memory_file(&directory.path().join("memory"))
            .hotplug_port()
            .balloon(None);
        vm::run(&config, |guest| {
            guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
            if written > Size::default() {
                guest.touch(written)?;
            }
            let save = |contestant, begin: Instant| -> Result<()> {
                let snapshot = guest.save(directory.path())?;
                let run = Run {
                    took: begin.elapsed(),
                    transferred: Some(snapshot.size),
                    ..Run::default()
                };
                bench.add(Subject::new(name, contestant, MEMORY, written), run);
                Ok(())
            };
            save(AS_IT_IS, Instant::now())?;
            guest.insmod(Driver::Rust, &[])?;
            let begin = Instant::now();
            guest.reclaim()?;
            save(Contestant::OURS, begin)
        })
    })
}

fn claims(records: &[Record]) -> Vec<Claim> {
    Claim::copied(records, "snapshot-dirty", Contestant::OURS, AS_IT_IS, 0.1)
        .into_iter()
        .collect()
}
