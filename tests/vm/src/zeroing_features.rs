// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose kernel zeroes all memory that it allocates: host requests, hints, virtio-mem, hibernation, and devices that end.

use std::mem;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use balloon_control::{Begun, Progress, Request, RequestStatus};
use serde_json::json;
use vm::{Config, Guest, Load, Offer, PageFlag, RunningLoad, Size};

use crate::compaction::{MEMORY, fullest_block_of};
use crate::debugfs::show;
use crate::hinting::check_all_back;
use crate::lifecycle::{device, driver_directory};
use crate::scenario::{
    BOTH_KERNELS, EXTENDED_DEVICE, PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup,
    TEST_KERNEL, VHOST_USER_DEVICE,
};
use crate::sizes::{agree, check_size};
use crate::transports::accepted;
use crate::zeroing::{
    MOST_MORE, TRIES, check_online, resident, settle_with_blocks, taken, zeroing,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "zeroing_reclaim",
        proves: "the host gets free memory back where the kernel zeroes memory, and does not need more of its own meanwhile",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: reclaim,
    },
    Scenario {
        name: "zeroing_hints",
        proves: "a guest whose kernel zeroes memory migrates without its unused memory, and the host does not need more memory meanwhile",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: hints,
    },
    Scenario {
        name: "zeroing_virtio_mem",
        proves: "the balloon takes no memory blocks in a guest with a virtio-mem device, which continues to work",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: virtio_mem,
    },
    Scenario {
        name: "zeroing_hibernate",
        proves: "a guest whose balloon has memory blocks hibernates, and the balloon takes memory blocks again after resume",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: hibernate,
    },
    Scenario {
        name: "zeroing_must_tell_host",
        proves: "with VIRTIO_BALLOON_F_MUST_TELL_HOST no page of a memory block is free before the device has acknowledged it",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: VHOST_USER_DEVICE,
        run: must_tell_host,
    },
    Scenario {
        name: "zeroing_removal",
        proves: "memory blocks are online again when the device is unplugged, or the driver unbound, while the balloon takes them",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: removal,
    },
    Scenario {
        name: "zeroing_locked",
        proves: "the driver is unbound, or the module unloaded, while another process holds the kernel's lock for memory hotplug, and all memory blocks come online",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: locked,
    },
    Scenario {
        name: "zeroing_failed_restore",
        proves: "memory blocks are online again after hibernation although the device does not respond any more",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: failed_restore,
    },
];

/// The bit of `VIRTIO_BALLOON_F_MUST_TELL_HOST`.
const MUST_TELL_HOST: usize = 0;

/// Prints the signals that the shell ignores.
const SIGNALS: &str = "grep ^SigIgn: /proc/$$/status";

/// Loads the driver, and starts a program that holds data. Returns the guest's memory, and the
/// program.
pub(crate) fn begin<'a>(
    setup: &Setup,
    guest: &'a Guest,
    parameters: &[&str],
) -> Result<(Size, RunningLoad<'a>)> {
    guest.insmod(setup.driver, parameters)?;
    let total = guest.meminfo()?.total;
    let data = guest.load(Load::Hold {
        mib: 64,
        threads: 1,
    })?;
    Ok((total, data))
}

/// Checks that the program has its data, and the guest the `total` of its memory. Unloads the driver.
pub(crate) fn end(setup: &Setup, guest: &Guest, total: Size, data: RunningLoad<'_>) -> Result<()> {
    data.verify(2)?;
    data.stop()?;
    check_online(guest)?;
    let now = guest.meminfo()?.total;
    ensure!(now == total, "the guest had {total}, and has {now}");
    guest.rmmod(setup.driver)
}

fn reclaim(setup: &Setup) -> Result<()> {
    let taken = reclaim_from(setup, Size::gib(8), Size::mib(6800), &[])?;
    // A guest with hardly any processor time gives up blocks that take too long.
    ensure!(
        taken > Size::default(),
        "no memory was taken as memory blocks"
    );
    // Without memory blocks it takes much longer.
    let taken = reclaim_from(setup, Size::mib(512), Size::mib(256), &["memory_blocks=0"])?;
    ensure!(
        taken == Size::default(),
        "{taken} were taken as memory blocks"
    );
    Ok(())
}

/// Makes a guest use a part of its memory, and checks that the host gets it back. Returns how much of it was memory
/// blocks.
fn reclaim_from(setup: &Setup, memory: Size, used: Size, parameters: &[&str]) -> Result<Size> {
    let config = zeroing(setup).using_memory().memory(memory);
    vm::run(&config, |guest| {
        let (total, data) = begin(setup, guest, parameters)?;
        guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
        guest.touch(used)?;

        let before = resident(setup, guest)?;
        let mut most = before;
        let start = Instant::now();
        let begun: Begun = guest.daemon()?.call(&Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        })?;
        guest.wait_until("memory returned to the host", PATIENCE, || {
            most = most.max(resident(setup, guest)?);
            let progress: Progress = guest.daemon()?.call(&Request::Progress { id: begun.id })?;
            Ok(progress.status == RequestStatus::Complete)
        })?;
        let (took, after) = (start.elapsed(), resident(setup, guest)?);
        let more = most.saturating_sub(before);
        let blocks = Size::bytes(show(guest, "unused_block_bytes")?.trim().parse()?);
        setup.note(format!(
            "the guest's memory took {before}, and takes {after} after {} ms, at most {more} more than before; {blocks} were memory blocks",
            took.as_millis()
        ));
        ensure!(
            more <= MOST_MORE,
            "the guest used {more} more memory while it inflated"
        );
        ensure!(
            after + Size::bytes(used.as_bytes() / 10 * 9) < before,
            "the guest's memory took {before}, and takes {after} after it had freed {used}"
        );
        end(setup, guest, total, data)?;
        Ok(blocks)
    })
}

fn hints(setup: &Setup) -> Result<()> {
    const SLOW: Size = Size::mib(32);
    let memory = Size::gib(4);
    let config = zeroing(setup).memory(memory).offer(&[Offer::FreePageHint]);
    vm::run(&config, |guest| {
        let (total, data) = begin(setup, guest, setup.driver.low_floor())?;
        guest.touch(Size::gib(1))?;
        let (free, before) = (guest.free()?, resident(setup, guest)?);

        let migration = guest.migrate(SLOW)?;
        let mut most = before;
        let hinted = || -> Result<Size> {
            let bytes = show(guest, "hinted_bytes")?;
            Ok(Size::bytes(bytes.trim().parse()?))
        };
        guest.wait_until("hints", PATIENCE, || {
            most = most.max(resident(setup, guest)?);
            Ok(hinted()? >= Size::gib(2))
        })?;
        // The driver may still hint the rest.
        let mut last = Size::default();
        guest.wait_until("the last hint", PATIENCE, || {
            most = most.max(resident(setup, guest)?);
            let now = hinted()?;
            Ok(mem::replace(&mut last, now) == now)
        })?;
        let more = most.saturating_sub(before);
        let transfer = migration.finish()?;
        setup.note(format!(
            "{last} hinted, {} sent, at most {more} more than before",
            transfer.sent
        ));
        ensure!(
            more <= MOST_MORE,
            "the guest used {more} more memory while it inflated"
        );
        data.verify(20)?;
        check_all_back(guest, free)?;
        end(setup, guest, total, data)
    })
}

fn virtio_mem(setup: &Setup) -> Result<()> {
    let (size, more) = (Size::mib(512), Size::gib(1));
    let config = zeroing(setup)
        .memory(Size::gib(2))
        .virtio_mem(more)
        .balloon(Some("virtio-balloon-pci,id=balloon0"));
    vm::run(&config, |guest| {
        let (total, data) = begin(setup, guest, setup.driver.low_floor())?;
        for _ in 0..2 {
            guest.plug(more)?;
            guest.balloon().settle(size)?;
            guest.plug(Size::default())?;
            check_size(guest, size)?;
            let now = guest.meminfo()?.total;
            ensure!(
                now + size == total,
                "the guest has {now} along with a balloon of {size}, and had {total} before"
            );
            guest.balloon().settle(Size::default())?;
        }
        let blocks = taken(guest)?;
        ensure!(
            blocks == 0,
            "{blocks} memory blocks were taken, although virtio-mem needs the kernel's callback"
        );
        data.verify(5)?;
        end(setup, guest, total, data)
    })
}

fn hibernate(setup: &Setup) -> Result<()> {
    let (before, after) = (Size::mib(1024), Size::mib(1200));
    let config = zeroing(setup).memory(Size::gib(2));
    let blocks = |guest: &Guest, size: Size| -> Result<u64> {
        guest.balloon().reach(size)?;
        check_size(guest, size)?;
        check_online(guest)?;
        let blocks = taken(guest)?;
        ensure!(blocks > 0, "no memory block was taken");
        Ok(blocks)
    };
    let (hibernated, (total, load, taken_before)) = vm::hibernate(&config, |guest| {
        let (total, data) = begin(setup, guest, &[])?;
        guest.balloon().request(before)?;
        let taken = blocks(guest, before)?;
        Ok((total, data.id(), taken))
    })?;
    hibernated.resume(after, |guest| {
        let taken = blocks(guest, after)?;
        ensure!(
            taken > taken_before,
            "{taken} memory blocks were taken, and {taken_before} before"
        );
        let data = guest.running(load);
        data.verify(2)?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        end(setup, guest, total, data)
    })
}

fn removal(setup: &Setup) -> Result<()> {
    // Taking so many blocks takes longer than unplugging the device.
    let memory = Size::gib(8);
    let port = json!({ "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port0" });
    let config = zeroing(setup)
        .memory(memory)
        .hotplug_port()
        .balloon(Some(&port.to_string()));
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        let begin = || {
            guest.balloon().request(memory - Size::mib(1))?;
            guest.wait_until("memory blocks", PATIENCE, || Ok(taken(guest)? > 0))
        };
        let check = || {
            agree(guest, || check_online(guest))?;
            let now = guest.meminfo()?.total;
            ensure!(now == total, "the guest had {total}, and has {now}");
            Ok(())
        };

        for _ in 0..3 {
            begin()?;
            // ACPI holds the kernel's lock for memory hotplug meanwhile.
            guest.unplug_balloon()?;
            check()?;
            guest.plug_balloon(&port)?;
        }

        let unbind = format!(
            "{SIGNALS}; echo {} >{}/unbind; {SIGNALS}",
            device(guest, setup.driver)?,
            driver_directory(setup.driver)
        );
        begin()?;
        let signals = guest.sh(&unbind)?;
        let mut signals = signals.lines();
        let (before, after) = (signals.next(), signals.next());
        ensure!(
            before.is_some() && before == after,
            "the process that unbinds ignored {before:?} before, and {after:?} after that"
        );
        check()?;
        guest.rmmod(setup.driver)
    })
}

/// A process in the guest that takes a memory block offline. The kernel cannot migrate one of its pages, and tries with
/// its lock for memory hotplug held until a signal comes.
struct Offlining<'a> {
    process: String,
    _pin: RunningLoad<'a>,
}

/// A guest with such a block.
fn with_movable_blocks(setup: &Setup) -> Config {
    zeroing(setup)
        .memory(Size::gib(4))
        .parameter("movablecore=512M")
}

/// Makes the driver take memory blocks, and starts the other process while a block is offline that the driver has taken.
fn begin_offlining(guest: &Guest) -> Result<Offlining<'_>> {
    let pin = guest.load(Load::Pin)?;
    let block = fullest_block_of(guest, MEMORY, "^Movable", PageFlag::Locked)?;
    // The driver may refuse once: while it brings a block online.
    let start = format!(
        "(until echo offline >{}; do :; done) >/dev/null 2>&1 & echo $!",
        block.state
    );
    let states = || -> Result<Vec<String>> {
        let states = guest.sh(&format!("cat {} {MEMORY}/memory*/state", block.state))?;
        Ok(states.lines().map(str::to_owned).collect())
    };
    for _ in 0..TRIES {
        guest.balloon().settle(Size::default())?;
        let before = taken(guest)?;
        guest.balloon().request(Size::gib(3))?;
        guest.wait_until("memory blocks", PATIENCE, || Ok(taken(guest)? > before))?;
        let process = guest.sh(&start)?.trim().to_owned();
        guest.wait_until("a block that is going offline", PATIENCE, || {
            Ok(states()?[0] == "going-offline")
        })?;
        if states()?[1..].iter().any(|state| state == "offline") {
            return Ok(Offlining { process, _pin: pin });
        }
        // The driver had taken all blocks before the other process got the lock.
        guest.sh(&format!("kill -9 {process}"))?;
    }
    bail!("no memory block was offline when the other process got the lock")
}

fn locked(setup: &Setup) -> Result<()> {
    vm::run(&with_movable_blocks(setup), |guest| {
        let total = guest.meminfo()?.total;
        let check = || {
            check_online(guest)?;
            let now = guest.meminfo()?.total;
            ensure!(now == total, "the guest had {total}, and has {now}");
            Ok(())
        };
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let device = device(guest, setup.driver)?;
        let bind = |action: &str| {
            let file = format!("{}/{action}", driver_directory(setup.driver));
            guest.write_file(&file, &device)
        };

        // The other process has the lock until the driver has left the device.
        let offlining = begin_offlining(guest)?;
        bind("unbind")?;
        guest.sh(&format!("kill -9 {}", offlining.process))?;
        agree(guest, check)?;

        bind("bind")?;
        let offlining = begin_offlining(guest)?;
        // The driver retries for longer.
        guest.sh(&format!(
            "rmmod {} & rmmod=$!; sleep 2; kill -9 {}; wait $rmmod",
            setup.driver.name(),
            offlining.process
        ))?;
        check()
    })
}

fn must_tell_host(setup: &Setup) -> Result<()> {
    let size = Size::mib(768);
    let config = zeroing(setup)
        .memory(Size::gib(2))
        .daemon_argument("--features=must-tell-host");
    vm::run(&config, |guest| {
        let (total, data) = begin(setup, guest, setup.driver.low_floor())?;
        ensure!(
            accepted(guest, setup.driver, MUST_TELL_HOST)?,
            "the driver has not negotiated MUST_TELL_HOST"
        );
        for _ in 0..3 {
            settle_with_blocks(guest, size, 1)?;
            check_size(guest, size)?;
        }
        guest.balloon().settle(Size::default())?;
        let refused = guest.daemon()?.info()?.counters.refused;
        ensure!(refused.is_empty(), "the device has refused {refused:?}");
        end(setup, guest, total, data)
    })
}

fn failed_restore(setup: &Setup) -> Result<()> {
    vm::run(&with_movable_blocks(setup), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let offlining = begin_offlining(guest)?;
        guest.daemon()?.kill()?;
        // The other process continues its attempt afterwards.
        guest.hibernate_without_disk()?;
        guest.sh(&format!("kill -9 {}", offlining.process))?;
        agree(guest, || check_online(guest))?;
        guest.rmmod(setup.driver)?;
        check_online(guest)
    })
}
