// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cost of ballooning, in counts that do not depend on the speed or the load of the machine.

use std::fmt;

use anyhow::{Result, ensure};
use vm::{Guest, Size};

use crate::scenario::{EXTENDED_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "costs_idle",
        proves: "nearly all of an idle guest's memory is inflated and deflated with a few messages and calls",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: idle,
    },
    Scenario {
        name: "costs_fragmented",
        proves: "isolated order-0 pages cost one bit for each page, are allocated in bulk, and start no compaction",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: fragmented,
    },
    Scenario {
        name: "costs_large",
        proves: "a guest of 64 GiB lists 7 GiB of its idle memory in one message",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: large,
    },
];

/// The cost of an operation, or its limit.
#[derive(Clone, Copy)]
struct Costs {
    /// The size of the guest's messages that list pages, in bytes.
    bytes: u64,
    /// How many times the guest notifies the device.
    notifications: u64,
    /// How many times the driver allocates memory, for the balloon or for itself.
    allocations: u64,
    /// How many system calls return memory to the host.
    discards: u64,
}

impl Costs {
    /// Sets the balloon's size, and returns the cost.
    fn of(setup: &Setup, guest: &Guest, size: Size) -> Result<Self> {
        let discards = || -> Result<u64> { Ok(guest.daemon()?.info()?.counters.discards) };
        let (sent_before, discards_before) = (guest.sent()?, discards()?);
        let (_, allocations) =
            guest.trace_allocations(setup.driver, || guest.balloon().settle(size))?;
        let sent = guest.sent()?.since(&sent_before);
        Ok(Self {
            bytes: sent.bytes,
            notifications: sent.notifications,
            allocations: allocations.try_into()?,
            discards: discards()? - discards_before,
        })
    }

    /// Checks that no count exceeds `limits`.
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
        // A few ranges of 8 bytes each. Page frame numbers would take 800 KiB.
        bytes: 256,
        // All of it is named at once.
        notifications: 4,
        // One for each block of 4 MiB, and some for messages. Order-0 pages would need 200,000.
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
    // It would move pages into memory that the host has not provided yet.
    const COMPACTION: &str = "compact_daemon_wake";
    const MEMORY: Size = Size::gib(2);
    // A quarter of a GiB of it is in larger blocks.
    const SIZE: Size = Size::mib(768);
    const LIMITS: Costs = Costs {
        // A bit for each page of the guest's memory, and a hundredth for headers: page frame numbers would take 768
        // KiB.
        bytes: MEMORY.as_pages() / 8 * 101 / 100,
        // All of it is named at once.
        notifications: 4,
        // Order-0 pages are allocated in bulk.
        allocations: 512,
        // One for each isolated page: half a GiB, and a tenth more for other fragments.
        discards: Size::mib(512).as_pages() * 11 / 10,
    };
    let config = setup.config().using_memory().memory(MEMORY);
    vm::run(&config, |guest| {
        let load = guest.fragment()?;
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let before = guest.vmstat(COMPACTION)?;
        Costs::of(setup, guest, SIZE)?.check(setup, "inflating", LIMITS)?;
        let woken = guest.vmstat(COMPACTION)? - before;
        ensure!(woken == 0, "the balloon has woken kcompactd {woken} times");
        guest.balloon().settle(Size::default())?;
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn large(setup: &Setup) -> Result<()> {
    const SIZE: Size = Size::gib(56);
    // One for each 7 GiB, and some more: other tasks may run in between.
    const LIMIT: u64 = 10;
    vm::run(&setup.config().memory(Size::gib(64)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let before = guest.sent()?;
        guest.balloon().settle(SIZE)?;
        let sent = guest.sent()?.since(&before);
        setup.note(format!("inflating {SIZE}: {sent}"));
        // The driver reports its size once in a second of work, so that the number of bytes depends on the machine.
        ensure!(
            sent.encoded_as("ranges")? <= LIMIT,
            "inflating {SIZE} takes {sent}; the limit is {LIMIT} lists of ranges"
        );
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}
