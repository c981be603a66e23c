// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose kernel zeroes all memory that it allocates, as many distributions' kernels do.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use vm::{Config, Device, Guest, Load, Offer, Size, Zeroing};

use crate::compaction::{fullest_block, write};
use crate::debugfs::{show, value};
use crate::nodes::check_nodes;
use crate::reporting::wait_until_taken;
use crate::scenario::{
    ALL_DEVICES, BOTH_KERNELS, EXTENDED_DEVICE, FAST_KERNELS, PATIENCE, QEMU_DEVICE, RUST_DRIVER,
    Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::{agree, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "zeroing_blocks",
        proves: "the balloon inflates with memory blocks where the kernel zeroes memory and does not need more of the host",
        kernels: FAST_KERNELS,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: blocks,
    },
    Scenario {
        name: "zeroing_pages",
        proves: "memory that the kernel has zeroed is returned to the host in small steps",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: pages,
    },
    Scenario {
        name: "zeroing_hotplug",
        proves: "the balloon inflates with memory blocks while an administrator takes them offline and online, and vacates them",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: hotplug,
    },
    Scenario {
        name: "zeroing_oom",
        proves: "a process that runs out of memory survives, whether the balloon has memory blocks or is about to take them",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: oom,
    },
    Scenario {
        name: "zeroing_fallback",
        proves: "the balloon inflates with pages where memory blocks are in use, or cannot be taken offline",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: fallback,
    },
    Scenario {
        name: "zeroing_cma",
        proves: "the balloon takes the memory blocks around CMA memory, which the kernel does not take offline",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: cma,
    },
    Scenario {
        name: "zeroing_nodes",
        proves: "the balloon takes memory blocks of both NUMA nodes in proportion",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: nodes,
    },
    Scenario {
        name: "zeroing_broken_page",
        proves: "the balloon leaves a memory block with a broken page alone, since it could not come online again",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: broken_page,
    },
];

/// How much more of the host's memory the guest may use while it inflates.
pub(crate) const MOST_MORE: Size = Size::mib(32);

/// A guest whose kernel zeroes memory.
pub(crate) fn zeroing(setup: &Setup) -> Config {
    setup.config().zeroing(Zeroing::On)
}

/// How many times the balloon inflates at most until the driver has taken enough memory blocks. It gives up a block that
/// takes too long, as on a busy machine.
pub(crate) const TRIES: u64 = 10;

/// Inflates an empty balloon by `size` until the driver has taken so many memory blocks for that. Returns their number.
pub(crate) fn settle_with_blocks(guest: &Guest, size: Size, least: u64) -> Result<u64> {
    let mut most = 0;
    for _ in 0..TRIES {
        guest.balloon().settle(Size::default())?;
        let before = taken(guest)?;
        guest.balloon().settle(size)?;
        let blocks = taken(guest)? - before;
        if blocks >= least {
            return Ok(blocks);
        }
        most = most.max(blocks);
    }
    bail!("at most {most} memory blocks were taken for {size}, not {least}")
}

/// How much of the host's memory the guest uses.
pub(crate) fn resident(setup: &Setup, guest: &Guest) -> Result<Size> {
    match setup.device {
        Device::Qemu => guest.resident(),
        Device::VhostUser | Device::Extended => guest.memory_file()?.resident(),
    }
}

/// Inflates by `size`. Returns how long it took, and how much more of the host's memory the guest
/// used meanwhile.
fn inflate(setup: &Setup, guest: &Guest, size: Size) -> Result<(Duration, Size)> {
    let before = resident(setup, guest)?;
    let mut most = before;
    let took = guest.balloon().settle_watched(size, |_| {
        if let Ok(now) = resident(setup, guest) {
            most = most.max(now);
        }
    })?;
    Ok((took, most.saturating_sub(before)))
}

/// How many memory blocks the driver has taken.
pub(crate) fn taken(guest: &Guest) -> Result<u64> {
    value(&show(guest, "balloon")?, "memory_blocks")
}

/// Checks that all memory blocks are online.
pub(crate) fn check_online(guest: &Guest) -> Result<()> {
    let states = guest.sh("cat /sys/devices/system/memory/memory*/state")?;
    let online = states.lines().filter(|&state| state == "online").count();
    let all = states.lines().count();
    ensure!(online == all, "{online} of {all} memory blocks are online");
    Ok(())
}

/// Waits until the guest's total, the inflated and deflated pages, and the offline pages have these
/// numbers.
fn agree_on(guest: &Guest, balloon: &str, expected: [u64; 4]) -> Result<()> {
    agree(guest, || {
        let now = counters(guest)?;
        ensure!(
            now == expected,
            "with {balloon} balloon the counters are {now:?}, not {expected:?}"
        );
        Ok(())
    })
}

fn counters(guest: &Guest) -> Result<[u64; 4]> {
    Ok([
        guest.meminfo()?.total.as_pages(),
        guest.vmstat("balloon_inflate")?,
        guest.vmstat("balloon_deflate")?,
        guest.offline_pages(None)?,
    ])
}

/// Checks that the balloon takes the memory below 4 GiB last, which devices may need.
fn check_order(guest: &Guest) -> Result<()> {
    let low = || guest.offline_pages(Some(0..Size::gib(4).as_pages()));
    let before = low()?;
    settle_with_blocks(guest, Size::gib(2), 8)?;
    let taken = low()? - before;
    ensure!(taken == 0, "the balloon has {taken} pages below 4 GiB");
    guest.balloon().settle(Size::default())?;
    Ok(())
}

fn blocks(setup: &Setup) -> Result<()> {
    let size = Size::gib(7) + Size::pages(3);
    vm::run(&zeroing(setup).memory(Size::gib(8)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        check_order(guest)?;
        let [total, inflated, deflated, offline] = counters(guest)?;
        let data = guest.load(Load::Hold {
            mib: 128,
            threads: 2,
        })?;
        let pages = size.as_pages();

        let (mut round, mut with_blocks) = (0, 0);
        while with_blocks < 2 {
            round += 1;
            let before = taken(guest)?;
            let (took, more) = inflate(setup, guest, size)?;
            let blocks = taken(guest)? - before;
            setup.note(format!(
                "{size} in {} ms with {blocks} memory blocks, at most {more} more than before",
                took.as_millis()
            ));
            with_blocks += usize::from(blocks >= 40);
            ensure!(
                with_blocks == 2 || round < TRIES,
                "{blocks} memory blocks were taken"
            );
            check_size(guest, size)?;
            let (in_all, before) = (round * pages, (round - 1) * pages);
            let full = [
                total - pages,
                inflated + in_all,
                deflated + before,
                offline + pages,
            ];
            agree_on(guest, "a full", full)?;
            ensure!(
                more <= MOST_MORE,
                "the guest used {more} more memory while it inflated"
            );
            check_online(guest)?;

            let took = guest.balloon().settle(Size::default())?;
            setup.note(format!("and back in {} ms", took.as_millis()));
            check_size(guest, Size::default())?;
            // The driver may still have to report some pages.
            let empty = [total, inflated + in_all, deflated + in_all, offline];
            agree_on(guest, "an empty", empty)?;
        }
        data.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn pages(setup: &Setup) -> Result<()> {
    let size = Size::mib(700);
    vm::run(&zeroing(setup), |guest| {
        guest.insmod(setup.driver, &["memory_blocks=0", "floor_mib=32"])?;
        let (took, more) = inflate(setup, guest, size)?;
        setup.note(format!(
            "{size} in {} ms, at most {more} more than before",
            took.as_millis()
        ));
        check_size(guest, size)?;
        ensure!(
            more <= MOST_MORE,
            "the guest used {more} more memory while it inflated"
        );
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Brings all memory blocks online repeatedly, as a udev rule may do, and takes two of them
/// offline.
const OTHERS: &str = "cd /sys/devices/system/memory
    while [ ! -e /stop ]; do
        for block in memory8 memory9; do echo offline >$block/state; done
        for block in memory*; do echo online >$block/state; done
    done 2>/dev/null
    for block in memory*; do echo online >$block/state; done";

fn hotplug(setup: &Setup) -> Result<()> {
    let size = Size::mib(768);
    vm::run(&zeroing(setup).memory(Size::gib(2)), |guest| {
        guest.insmod(setup.driver, &[])?;
        let total = guest.meminfo()?.total;
        let data = guest.load(Load::Hold {
            mib: 64,
            threads: 1,
        })?;
        let others = guest.start(&["sh", "-c", OTHERS], Some(PATIENCE))?;
        for _ in 0..5 {
            guest.balloon().settle(size)?;
            // Long enough for the other process to take some of it offline.
            thread::sleep(Duration::from_millis(500));
            guest.balloon().settle(Size::default())?;
        }
        guest.sh("touch /stop")?;
        guest.output(&others, PATIENCE)?;
        check_online(guest)?;
        check_size(guest, Size::default())?;
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");

        let before = taken(guest)?;
        let blocks = settle_with_blocks(guest, size, 1)?;
        let with_balloon = guest.meminfo()?.total;
        let block = fullest_block(guest, ".")?;
        write(guest, &block.state, "offline")?;
        // The balloon inflates elsewhere, after the block is offline.
        agree(guest, || check_size(guest, size))?;
        write(guest, &block.state, "online")?;
        let now = guest.meminfo()?.total;
        ensure!(
            now == with_balloon,
            "the guest has {now} with the block online again, and had {with_balloon} before"
        );
        data.stop()?;

        // Unbinding ends the operation in progress, and leaves no block offline.
        guest.balloon().settle(Size::default())?;
        guest.balloon().request(size)?;
        guest.rmmod(setup.driver)?;
        check_online(guest)?;
        let now = guest.meminfo()?.total;
        ensure!(
            now == total,
            "the guest had {total}, and has {now} without the driver"
        );
        setup.note(format!("{blocks} memory blocks of {size}, {before} before"));
        Ok(())
    })
}

fn oom(setup: &Setup) -> Result<()> {
    let config = zeroing(setup)
        .memory(Size::gib(2))
        .offer(&[Offer::DeflateOnOom])
        // Pages that are allocated when their memory block is about to go offline have to be migrated.
        .expect(r"page allocation failure: order:0, .*\|__GFP_MOVABLE\|__GFP_RETRY_MAYFAIL");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        let available = guest.meminfo()?.available.as_mib();
        let (size, need) = (
            Size::mib(available * 3 / 4),
            usize::try_from(available / 2)?,
        );
        for is_inflated in [true, false] {
            guest.balloon().request(size)?;
            if is_inflated {
                guest.balloon().reach(size)?;
                let now = guest.meminfo()?.total;
                ensure!(
                    now == total,
                    "memory that can come back counts as the guest's: {now} of {total}"
                );
            }
            let load = guest.start_load(Load::Hog { mib: need })?;
            wait_until_taken(guest, &load, need)?;
            load.stop()?;
            guest.balloon().settle(Size::default())?;
        }
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        let blocks = taken(guest)?;
        ensure!(blocks > 0, "no memory block was taken");
        check_size(guest, Size::default())?;
        check_online(guest)?;
        setup.note(format!("{blocks} memory blocks were taken"));
        guest.rmmod(setup.driver)
    })
}

fn fallback(setup: &Setup) -> Result<()> {
    vm::run(&zeroing(setup).memory(Size::gib(2)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let inflate = |size: Size| -> Result<u64> {
            let before = taken(guest)?;
            let (took, more) = inflate(setup, guest, size)?;
            let blocks = taken(guest)? - before;
            check_size(guest, size)?;
            ensure!(
                more <= MOST_MORE,
                "the guest used {more} more memory while it inflated"
            );
            setup.note(format!(
                "{size} with {blocks} memory blocks in {} ms, at most {more} more than before",
                took.as_millis()
            ));
            guest.balloon().settle(Size::default())?;
            check_online(guest)?;
            Ok(blocks)
        };

        // Half of the memory is in use, and some of the rest holds files.
        let data = guest.load(Load::Hold {
            mib: 800,
            threads: 2,
        })?;
        guest.sh("dd if=/dev/zero of=/file bs=1M count=200 2>/dev/null")?;
        inflate(Size::mib(700))?;
        data.stop()?;
        guest.sh("rm /file")?;

        guest.sh("mount -o remount,ro /sys")?;
        let blocks = inflate(Size::mib(300))?;
        ensure!(
            blocks == 0,
            "{blocks} blocks were taken, which cannot be taken offline"
        );
        guest.rmmod(setup.driver)
    })
}

fn cma(setup: &Setup) -> Result<()> {
    // More memory than there is below the area, which has 1 GiB at least and begins at 4 GiB.
    let size = Size::mib(2_560);
    let config = zeroing(setup)
        .memory(Size::gib(4))
        .parameter("hugetlb_cma=1G");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        // Blocks of 128 MiB.
        let blocks = settle_with_blocks(guest, size, 19)?;
        check_size(guest, size)?;
        setup.note(format!("{blocks} memory blocks of {size}"));
        check_online(guest)?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

fn nodes(setup: &Setup) -> Result<()> {
    let size = Size::mib(1280);
    let config = zeroing(setup).memory(Size::gib(3)).nodes(2);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        // Blocks of 128 MiB.
        let blocks = settle_with_blocks(guest, size, 8)?;
        setup.note(format!("{blocks} memory blocks of {size}"));
        check_nodes(setup, guest, size)?;
        check_online(guest)?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Reports a memory error in some memory blocks of 128 MiB, in pages that are most likely free.
const BREAK: &str = "for block in 8 9 10 11 12 13; do
        echo $((block * 32768 + 12345)) >/sys/kernel/debug/hwpoison/corrupt-pfn
    done";

fn broken_page(setup: &Setup) -> Result<()> {
    // More than the memory of the other blocks.
    let size = Size::mib(1600);
    vm::run(&zeroing(setup).memory(Size::gib(2)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        guest.sh(BREAK)?;
        let broken = guest.sh("grep ^HardwareCorrupted: /proc/meminfo")?;
        ensure!(
            broken.split_whitespace().nth(1) == Some("24"),
            "not all six pages are broken: {broken}"
        );
        let blocks = settle_with_blocks(guest, size, 1)?;
        check_size(guest, size)?;
        check_online(guest)?;
        guest.balloon().settle(Size::default())?;
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        setup.note(format!("{blocks} memory blocks of {size}"));
        guest.rmmod(setup.driver)
    })
}
