// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What ballooning costs, in numbers that are the same on a slow machine and on a busy one.

use std::fmt;

use anyhow::{Result, ensure};
use vm::{Guest, Size};

use crate::scenario::{EXTENDED_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "costs_idle",
        proves: "nearly all of an idle guest's memory goes and comes back for next to nothing",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: idle,
    },
    Scenario {
        name: "costs_fragmented",
        proves: "lone pages cost no more than a bit for each page, and are not allocated one by one",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: fragmented,
    },
];

/// What something has cost, or may cost.
#[derive(Clone, Copy)]
struct Costs {
    /// What the guest sends to name its pages, in bytes.
    bytes: u64,
    /// How many times it notifies the device.
    notifications: u64,
    /// How many times the driver allocates memory, for the balloon or for itself.
    allocations: u64,
    /// How many system calls give memory back.
    discards: u64,
}

impl Costs {
    /// Has the balloon go to a size, and says what that has cost.
    fn of(setup: &Setup, guest: &Guest, size: Size) -> Result<Self> {
        let discards = || -> Result<u64> { Ok(guest.daemon()?.info()?.counters.discards) };
        let (sent_before, discards_before) = (guest.sent()?, discards()?);
        let (_, allocations) =
            guest.trace_allocations(setup.driver, || guest.balloon().settle(size))?;
        let sent = guest.sent()?.since(sent_before);
        Ok(Self {
            bytes: sent.bytes,
            notifications: sent.notifications,
            allocations: allocations.try_into()?,
            discards: discards()? - discards_before,
        })
    }

    /// Checks that nothing is more than in `limits`.
    fn check(self, setup: &Setup, what: &str, limits: Self) -> Result<()> {
        setup.note(format!("{what}: {self}"));
        let pairs = [
            (self.bytes, limits.bytes),
            (self.notifications, limits.notifications),
            (self.allocations, limits.allocations),
            (self.discards, limits.discards),
        ];
        ensure!(
            pairs.iter().all(|(cost, limit)| cost <= limit),
            "{what} costs {self}; the limits are {limits}"
        );
        Ok(())
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes, {} notifications, {} allocations, {} discards",
            self.bytes, self.notifications, self.allocations, self.discards
        )
    }
}

fn idle(setup: &Setup) -> Result<()> {
    const SIZE: Size = Size::mib(800);
    const BOTH: Costs = Costs {
        // A few ranges, of which each takes 8: page frame numbers would take 800 KiB.
        bytes: 256,
        // All of it is named at once.
        notifications: 4,
        // One for each block of 4 MiB, and some for messages: page by page there would be 200,000.
        allocations: 256,
        // One for each range, and for each 32 MiB of it: others have their turn in between.
        discards: 16 + SIZE.as_mib() / 32,
    };
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        Costs::of(setup, guest, SIZE)?.check(setup, "inflating", BOTH)?;
        Costs::of(setup, guest, Size::default())?.check(setup, "deflating", BOTH)?;
        guest.rmmod(setup.driver)
    })
}

fn fragmented(setup: &Setup) -> Result<()> {
    const MEMORY: Size = Size::gib(2);
    // A quarter of a GiB of it is not in lone pages.
    const SIZE: Size = Size::mib(768);
    const LIMITS: Costs = Costs {
        // A bit for each page of the guest's memory, and a hundredth for headers: page frame numbers would take 768
        // KiB.
        bytes: MEMORY.as_pages() / 8 * 101 / 100,
        // All of it is named at once.
        notifications: 4,
        // Lone pages are allocated many at a time.
        allocations: 512,
        // One for each lone page, of which no two are neighbours: half a GiB, and a tenth for what else is in pieces.
        discards: Size::mib(512).as_pages() * 11 / 10,
    };
    let config = setup.config().using_memory().memory(MEMORY);
    vm::run(&config, |guest| {
        let load = guest.fragment()?;
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        Costs::of(setup, guest, SIZE)?.check(setup, "inflating", LIMITS)?;
        guest.balloon().settle(Size::default())?;
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}
