// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! For how long the kernel of a large guest has interrupts, or preemption, off.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Accel, Driver, Guest, Kernel, MemoryBackend, Off, Size};

use crate::compaction::{BLOCKS_OR_PAGES, fullest_block, write};
use crate::scenario::{BOTH_DRIVERS, Scenario, Setup};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "latency",
    proves: "a balloon in a guest of 64 GiB keeps interrupts and preemption off for 200,000 instructions at most",
    kernels: &[Kernel::Latency],
    drivers: BOTH_DRIVERS,
    devices: BLOCKS_OR_PAGES,
    run: latency,
}];

/// What no part of the kernel may take, at a nanosecond for each instruction.
const LIMIT: Duration = Duration::from_micros(200);

fn latency(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .memory(Size::gib(64))
        // Not all of it is the host's.
        .backend(MemoryBackend::Memfd)
        // The guest's clock counts instructions, those of its only processor: how fast the machine is, and what else it
        // does, makes no difference.
        .accel(Accel::Tcg)
        .cpus(1)
        .argument("-icount", "shift=0")
        .parameter("tsc=reliable");
    vm::run(&config, |guest| {
        let mut longest = Duration::ZERO;
        let mut measure = |what: &str, off: Off, work: &dyn Fn() -> Result<()>| -> Result<()> {
            let ((), section) = guest.trace_longest(off, work)?;
            setup.note(format!("{what}: {off:?} off for {section}"));
            longest = longest.max(section.time);
            Ok(())
        };
        for off in [Off::Interrupts, Off::Preemption] {
            measure("nothing", off, &|| {
                thread::sleep(Duration::from_secs(5));
                Ok(())
            })?;
        }
        let settle = |size: Size| guest.balloon().settle(size).map(drop);
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let size = match setup.driver {
            // With more it would take an hour, and for no page longer than for the first ones.
            Driver::C => Size::gib(2),
            _ => Size::gib(60),
        };
        for off in [Off::Interrupts, Off::Preemption] {
            measure("inflating", off, &|| settle(size))?;
            if setup.driver == Driver::Rust {
                measure("offlining", off, &|| offline(guest))?;
            }
            measure("deflating", off, &|| settle(Size::default()))?;
        }
        if setup.driver == Driver::Rust {
            ensure!(longest < LIMIT, "the longest took {longest:?}");
        }
        guest.rmmod(setup.driver)
    })
}

/// Takes a block of memory that is full of the balloon away from the guest, and gives it back.
fn offline(guest: &Guest) -> Result<()> {
    let block = fullest_block(guest, ".")?;
    write(guest, &block.state, "offline")?;
    write(guest, &block.state, "online")
}
