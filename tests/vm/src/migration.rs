// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration of a guest with the daemon's balloon (docs/howto-migration.md).

use std::time::Instant;

use anyhow::{Result, ensure};
use balloon_control::{Info, Request, Stats};
use serde_json::Value;
use vm::{Daemon, Guest, Load, MemoryBackend, Size};

use crate::scenario::{EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "migrate_with_daemon",
    proves: "a guest with the daemon's balloon migrates live without its unused memory, and has its balloon and its data afterwards",
    kernels: TEST_KERNEL,
    drivers: RUST_DRIVER,
    devices: EXTENDED_DEVICE,
    run: migrate_with_daemon,
}];

/// QEMU's own balloon, which takes no memory here: it gets the hints of the migration.
const HINTS: &str = "virtio-balloon-pci,id=hints,iothread=iothread0,free-page-hint=on";

const MEMORY: Size = Size::gib(2);

/// The memory that a process of the guest holds and verifies.
const HELD: Size = Size::mib(128);

/// The memory that the guest has used and freed before.
const FREED: Size = Size::mib(1280);

const TARGET: Size = Size::gib(1);

/// The interval of the statistics, in seconds.
const INTERVAL: u32 = 1;

/// By how much more the host's memory may be after the migration: programs of the guest have run.
const TOLERANCE: Size = Size::mib(96);

fn migrate_with_daemon(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .memory(MEMORY)
        .backend(MemoryBackend::Memfd)
        .hotplug_port()
        .balloon(Some(HINTS));
    vm::run(&config, |guest| {
        let data = guest.load(Load::Hold {
            mib: HELD.as_mib().try_into()?,
            threads: 2,
        })?;
        guest.touch(FREED)?;
        guest.insmod(setup.driver, &[])?;
        let source = guest.plug_daemon()?;
        balloon(guest, &source, TARGET.as_bytes())?;
        let Info { target, size, .. } = source.info()?;
        let host = || guest.memory_file()?.resident();
        let before = host()?;

        let start = Instant::now();
        guest.reclaim_with(&source)?;
        guest.unplug_daemon(source)?;
        let transfer = guest.migrate(Size::default())?.finish()?;
        let destination = guest.plug_daemon()?;
        balloon(guest, &destination, target)?;
        let without = start.elapsed();
        let arrived = host()?;
        // It has allocated the pages without content that the source has sent.
        guest.reclaim_with(&destination)?;

        let after = host()?;
        setup.note(format!(
            "{without:.1?} from the reclaim until the destination had the balloon again; {} were sent in {:.1?}, \
             and the guest was stopped for {:.1?}; {before} of the host's memory before, {arrived} then, and {after} \
             after another reclaim",
            transfer.sent, transfer.total, transfer.downtime
        ));
        ensure!(
            transfer.sent * 2 < FREED,
            "{} were sent of a guest that holds {HELD}",
            transfer.sent
        );
        ensure!(
            after < before + TOLERANCE,
            "{before} of memory became {after}"
        );
        let now = destination.info()?.size;
        ensure!(now == size, "the balloon has {now} bytes, and had {size}");
        data.verify(2)?;

        // The guest can use all of its memory.
        balloon(guest, &destination, 0)?;
        guest.touch(FREED)?;
        data.verify(2)?;
        data.stop()?;
        guest.unplug_daemon(destination)?;
        guest.rmmod(setup.driver)
    })
}

/// Waits until the guest's driver uses a daemon's device, sets its target, in bytes, and waits for the size and for
/// statistics.
fn balloon(guest: &Guest, daemon: &Daemon, target: u64) -> Result<()> {
    guest.wait_until("a driver for the balloon", PATIENCE, || {
        Ok(daemon.info()?.guest.driver)
    })?;
    daemon.call::<Value>(&Request::set(target))?;
    daemon.call::<Value>(&Request::SetStatsInterval { seconds: INTERVAL })?;
    guest.wait_until("the size of the balloon, and statistics", PATIENCE, || {
        let has_statistics = daemon
            .call::<Stats>(&Request::Stats { fresh: false })
            .is_ok();
        Ok(daemon.info()?.is_reached() && has_statistics)
    })
}
