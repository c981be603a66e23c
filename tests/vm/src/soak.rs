// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Thousands of targets, with every page accounted for.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use vm::{Guest, Load, Size};

use crate::scenario::{ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, Scenario, Setup};
use crate::sizes::{agree, check_free, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "soak",
    proves: "after ten thousand targets both sides agree on every page",
    kernels: BOTH_KERNELS,
    drivers: BOTH_DRIVERS,
    devices: ALL_DEVICES,
    run: soak,
}];

const STEPS: usize = 10_000;

/// How often the test counts all pages.
const STEPS_PER_COUNT: usize = 1_000;

/// The largest target, in pages.
const MOST: u64 = 400 << 8;

fn soak(setup: &Setup) -> Result<()> {
    let seed = setup.seeds().map_or(0, |seeds| seeds.start);
    let mut random = Rng::with_seed(seed);
    vm::run(&setup.config(), |guest| {
        let free = guest.free()?;
        guest.insmod(setup.driver, &[])?;
        let empty = Count::of(guest)?;
        let load = guest.load(Load::Churn {
            mib: 128,
            threads: 2,
            seed,
        })?;
        let mut reached = 0;
        for step in 1..=STEPS {
            let size = Size::pages(random.u64(0..MOST));
            // One of four targets may change before it is reached.
            if random.u8(0..4) > 0 || step % STEPS_PER_COUNT == 0 {
                guest.balloon().settle(size)?;
                reached += 1;
            } else {
                guest.balloon().request(size)?;
                thread::sleep(Duration::from_millis(random.u64(0..10)));
            }
            if step % STEPS_PER_COUNT == 0 {
                agree(guest, || check_count(guest, &empty, size))
                    .with_context(|| format!("after {step} steps"))?;
            }
        }
        load.verify(10)?;
        let verified = load.stop()?.progress.passes;
        setup.note(format!(
            "{reached} of {STEPS} targets were reached, and the data verified {verified} times"
        ));
        guest.balloon().settle(Size::default())?;
        agree(guest, || check_count(guest, &empty, Size::default()))?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

/// The counts of the guest's kernel.
struct Count {
    /// `MemTotal`.
    total: Size,
    /// The pages that are marked PageOffline.
    offline: u64,
    /// How many pages more have been inflated than deflated.
    inflated: u64,
}

impl Count {
    fn of(guest: &Guest) -> Result<Self> {
        let deflated = guest.vmstat("balloon_deflate")?;
        Ok(Self {
            total: guest.meminfo()?.total,
            offline: guest.offline_pages(None)?,
            inflated: guest.vmstat("balloon_inflate")? - deflated,
        })
    }
}

/// Checks that the guest and the host agree on a balloon of this size to the page. `empty` has the
/// counts without a balloon.
fn check_count(guest: &Guest, empty: &Count, size: Size) -> Result<()> {
    check_size(guest, size)?;
    let balloon = guest.meminfo()?.balloon;
    ensure!(
        balloon == size,
        "/proc/meminfo has {balloon} in balloons, and {size} are"
    );
    let now = Count::of(guest)?;
    let taken = empty.total.saturating_sub(now.total);
    ensure!(
        taken == size,
        "the guest manages {taken} less, with {size} in the balloon"
    );
    let marked = now.offline - empty.offline;
    ensure!(
        marked == size.as_pages(),
        "{marked} pages are marked as offline, and {} are in the balloon",
        size.as_pages()
    );
    let inflated = now.inflated - empty.inflated;
    ensure!(
        inflated == size.as_pages(),
        "{inflated} pages more were inflated than deflated, and {} are in the balloon",
        size.as_pages()
    );
    Ok(())
}
