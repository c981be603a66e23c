// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host requests for unused memory.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balloon_control::{Begun, Progress, Request, RequestStatus};
use serde_json::Value;
use vm::{Guest, Kernel, Load, Size};

use crate::debugfs::show;
use crate::overwriting::{List, Overwriting, unused};
use crate::scenario::{
    ALL_KERNELS, BOTH_KERNELS, EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "unused_data_intact",
        proves: "the guest's data stay intact when the host overwrites unused memory",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: data_intact,
    },
    Scenario {
        name: "unused_proof",
        proves: "memory that the driver lists as unused, and that was not written since, has no content that the guest needs",
        kernels: ALL_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: proof,
    },
    Scenario {
        name: "unused_bounded",
        proves: "the driver never holds a lock for long to list unused memory, and takes the same time for each GiB",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: bounded,
    },
    Scenario {
        name: "reclaim",
        proves: "the host gets memory back that the guest has freed, without inflating",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: reclaim,
    },
    Scenario {
        name: "request_flood",
        proves: "requests without pause cost the guest a bounded part of its CPU time",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: flood,
    },
    Scenario {
        name: "drop_caches",
        proves: "the guest drops caches on the host's request",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: drop_caches,
    },
    Scenario {
        name: "unused_lie",
        proves: "the proof fails for a driver that lists memory in use as unused",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: lie,
    },
];

/// How many PFNs the driver scans under one hold of a zone's lock.
const PFNS_PER_HOLD: u64 = 1024;

fn proof(setup: &Setup) -> Result<()> {
    let (memory, guests, rounds) = match setup.kernel {
        Kernel::Test => (Size::gib(8), 5, 10),
        _ => (Size::gib(2), 2, 3),
    };
    let mut total = Size::default();
    for seed in 0..guests {
        let guest = Overwriting {
            list: List::Unused,
            config: setup.config(),
            memory,
            rounds,
            seed,
        };
        guest
            .run(setup.driver, &mut total)
            .with_context(|| format!("with the seed {seed}"))?;
    }
    setup.note(format!(
        "{total} of unused memory were overwritten in {rounds} rounds in each of {guests} guests, and no corruption was \
         detected"
    ));
    ensure!(total > Size::default(), "nothing was overwritten");
    Ok(())
}

fn data_intact(setup: &Setup) -> Result<()> {
    let mut total = Size::default();
    small(setup).run(setup.driver, &mut total)?;
    ensure!(total > Size::default(), "nothing was overwritten");
    setup.note(format!("{total} of unused memory were overwritten"));
    Ok(())
}

fn lie(setup: &Setup) -> Result<()> {
    small(setup).detects_lie(setup)
}

/// Unused memory of a guest of 1 GiB.
fn small(setup: &Setup) -> Overwriting {
    Overwriting {
        list: List::Unused,
        config: setup.config(),
        memory: Size::gib(1),
        rounds: 2,
        seed: 0,
    }
}

/// Makes a request and waits for its end. Returns the result, and how long it took.
pub(crate) fn ask(guest: &Guest, request: &Request) -> Result<(Progress, Duration)> {
    let start = Instant::now();
    let daemon = guest.daemon()?;
    let begun: Begun = daemon.call(request)?;
    let progress = guest.complete(&daemon, begun)?;
    Ok((progress, start.elapsed()))
}

/// A counter of the driver's.
fn counter(guest: &Guest, name: &str) -> Result<u64> {
    Ok(show(guest, name)?.trim().parse()?)
}

fn bounded(setup: &Setup) -> Result<()> {
    /// How much longer a GiB may take in a larger guest.
    const LIMIT: f64 = 2.0;
    let mut for_each_gib = Vec::new();
    for memory in [Size::gib(2), Size::gib(8)] {
        vm::run(&setup.config().memory(memory), |guest| {
            let measure = |what: &str| -> Result<Duration> {
                guest.insmod(setup.driver, &[])?;
                let free = guest.free()?;
                let (progress, took) = ask(guest, &unused(4096))?;
                let pfns = counter(guest, "unused_max_pfns_per_hold")?;
                let hold = Duration::from_nanos(counter(guest, "unused_max_hold_ns")?);
                let named = Size::bytes(progress.named);
                setup.note(format!(
                    "{memory}, {what}: {named} of {free} listed in {} ms, the lock held for {} us and {pfns} PFNs at most",
                    took.as_millis(),
                    hold.as_micros()
                ));
                ensure!(
                    pfns <= PFNS_PER_HOLD,
                    "{pfns} PFNs were scanned under one hold of a lock"
                );
                ensure!(
                    named.as_bytes() * 10 > free.as_bytes() * 9,
                    "{named} of {free} free memory were listed"
                );
                guest.rmmod(setup.driver)?;
                Ok(took)
            };
            measure("idle")?;
            let load = guest.load(Load::Fragment {
                mib: usize::try_from(memory.as_mib() / 8 * 7)?,
            })?;
            let took = measure("lone pages")?.as_secs_f64();
            for_each_gib.push(took * Size::gib(1).as_bytes() as f64 / memory.as_bytes() as f64);
            if memory == Size::gib(8) {
                call_off(setup, guest)?;
            }
            load.stop()?;
            Ok(())
        })?;
    }
    ensure!(
        for_each_gib[1] < for_each_gib[0] * LIMIT,
        "isolated pages take {for_each_gib:?} s for each GiB of the two guests"
    );
    Ok(())
}

/// Cancels a request that takes the guest long to answer.
fn call_off(setup: &Setup, guest: &Guest) -> Result<()> {
    guest.insmod(setup.driver, &[])?;
    let daemon = guest.daemon()?;
    let begun: Begun = daemon.call(&unused(4096))?;
    let progress = || daemon.call::<Progress>(&Request::Progress { id: begun.id });
    while progress()?.named == 0 {
        guest.check_alive()?;
    }
    let start = Instant::now();
    daemon.call::<Value>(&Request::Cancel { id: begun.id })?;
    while progress()?.status == RequestStatus::Open {
        guest.check_alive()?;
    }
    let (progress, took) = (progress()?, start.elapsed());
    setup.note(format!(
        "cancelled after {} were listed: {:?} after {} ms",
        Size::bytes(progress.named),
        progress.status,
        took.as_millis()
    ));
    ensure!(
        progress.status == RequestStatus::Cancelled,
        "a cancelled request ends with {:?}",
        progress.status
    );
    guest.rmmod(setup.driver)
}

fn flood(setup: &Setup) -> Result<()> {
    const TIME: Duration = Duration::from_secs(20);
    /// The driver's budget: CPU time at once, and as a part of all time.
    const AT_ONCE: Duration = Duration::from_secs(2);
    const SHARE: u32 = 10;
    /// The CPU time of an idle guest.
    const OTHERS: Duration = Duration::from_secs(2);
    let requests = [
        unused(4096),
        Request::DropCaches {
            pages: true,
            slab: true,
        },
        Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        },
    ];
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let daemon = guest.daemon()?;
        let (before, start) = (guest.guest_cpu_time()?, Instant::now());
        let (mut asked, mut next) = (0_u64, requests.iter().cycle());
        while start.elapsed() < TIME {
            let request = next.next().context("a cycle has no end")?;
            match daemon.call::<Begun>(request) {
                Ok(_) => asked += 1,
                // The maximum number of requests is open.
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        let (spent, time) = (
            guest.guest_cpu_time()?.saturating_sub(before),
            start.elapsed(),
        );
        setup.note(format!(
            "{asked} requests in {} s took the guest {} ms",
            time.as_secs(),
            spent.as_millis()
        ));
        ensure!(
            spent < AT_ONCE + time / SHARE + OTHERS,
            "the guest was busy for {spent:?} of {time:?} with {asked} requests"
        );
        // Ending the guest cancels the open requests.
        guest.balloon().settle(Size::mib(256))?;
        guest.balloon().settle(Size::default())?;
        daemon.call::<Value>(&Request::Stats { fresh: true })?;
        guest.rmmod(setup.driver)
    })
}

fn reclaim(setup: &Setup) -> Result<()> {
    let (memory, used) = setup.by_speed((Size::gib(8), Size::gib(6)), (Size::gib(2), Size::gib(1)));
    vm::run(&setup.config().memory(memory), |guest| {
        guest.insmod(setup.driver, &[])?;
        let file = guest.memory_file()?;
        let data = guest.load(Load::Churn {
            mib: 256,
            threads: 2,
            seed: 1,
        })?;
        guest.touch(used)?;
        let (before, free) = (file.resident()?, guest.free()?);
        let start = Instant::now();
        let begun: Begun = guest.daemon()?.call(&Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        })?;
        let mut least = free;
        guest.wait_until("memory returned to the host", PATIENCE, || {
            least = least.min(guest.free()?);
            let progress: Progress = guest.daemon()?.call(&Request::Progress { id: begun.id })?;
            Ok(progress.status == RequestStatus::Complete)
        })?;
        let took = start.elapsed();
        let after = file.resident()?;
        setup.note(format!(
            "the guest's memory took {before}, and takes {after} after {} ms; {} less than {free} were free meanwhile",
            took.as_millis(),
            free.saturating_sub(least)
        ));
        ensure!(
            after + Size::bytes(used.as_bytes() / 10 * 9) < before,
            "the guest's memory took {before}, and takes {after} after it had freed {used}"
        );
        data.verify(50)?;
        data.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn drop_caches(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let slab = || -> Result<Size> {
            let line = guest.sh("grep ^SReclaimable: /proc/meminfo")?;
            let kib = line.split_whitespace().nth(1).context("a number")?;
            Ok(Size::kib(kib.parse()?))
        };
        // Names and inodes that are no longer in use.
        guest.sh("find /sys /proc/1 > /dev/null")?;
        let before = slab()?;
        let request = Request::DropCaches {
            pages: true,
            slab: true,
        };
        let (_, took) = ask(guest, &request)?;
        let after = slab()?;
        setup.note(format!(
            "{before} in caches of names and inodes, {after} after {} ms",
            took.as_millis()
        ));
        ensure!(
            after.as_bytes() * 2 < before.as_bytes(),
            "the caches of names and inodes had {before}, and have {after}"
        );
        guest.rmmod(setup.driver)
    })
}
