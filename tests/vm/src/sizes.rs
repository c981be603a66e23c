// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon has the size that the host asks for, and both sides agree on it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vm::{Guest, Size};

use crate::scenario::{
    ALL_ARCHITECTURES, ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, PATIENCE, RUST_DRIVER, Scenario,
    Setup, TEST_KERNEL,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "inflate_deflate",
        proves: "the balloon reaches every requested size, and both sides agree on it",
        kernels: ALL_ARCHITECTURES,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: inflate_deflate,
    },
    Scenario {
        name: "accounting",
        proves: "the kernel's counters match the balloon to the page",
        kernels: ALL_ARCHITECTURES,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: accounting,
    },
    Scenario {
        name: "target_changes",
        proves: "the driver follows a target that changes before it is reached",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: target_changes,
    },
    Scenario {
        name: "target_beyond_memory",
        proves: "a target that cannot be reached does not harm the guest, and the driver follows a smaller one",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: target_beyond_memory,
    },
    Scenario {
        name: "floor",
        proves: "the balloon leaves floor_mib of available memory to the guest, and takes the rest",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: floor,
    },
    Scenario {
        name: "small_guest",
        proves: "a guest of 128 MiB inflates as far as it can and survives",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: small_guest,
    },
];

fn inflate_deflate(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        // Up and down, in large and small steps, by a page, and by sizes that are no multiple of a
        // block.
        for size in [
            Size::mib(128),
            Size::mib(400),
            Size::mib(1),
            Size::pages(1),
            Size::pages(3),
            Size::mib(300) + Size::pages(511),
            Size::mib(64) + Size::pages(1),
            Size::default(),
        ] {
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        guest.rmmod(setup.driver)
    })
}

fn accounting(setup: &Setup) -> Result<()> {
    let size = Size::mib(100) + Size::pages(7);
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let counters = || -> Result<[u64; 4]> {
            Ok([
                guest.meminfo()?.total.div_ceil(guest.page_size()),
                guest.vmstat("balloon_inflate")?,
                guest.vmstat("balloon_deflate")?,
                guest.offline_pages(None)?,
            ])
        };
        let [total, inflated, deflated, offline] = counters()?;
        let pages = size.div_ceil(guest.page_size());

        guest.balloon().settle(size)?;
        check_size(guest, size)?;
        let expected = [total - pages, inflated + pages, deflated, offline + pages];
        agree(guest, || {
            let full = counters()?;
            ensure!(
                full == expected,
                "with {pages} pages in the balloon, the total, those inflated and deflated and those \
                 marked as offline are {full:?} in place of {expected:?}"
            );
            Ok(())
        })?;

        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        let empty = counters()?;
        let expected = [total, inflated + pages, deflated + pages, offline];
        ensure!(
            empty == expected,
            "with an empty balloon, the total, those inflated and deflated and those marked as \
             offline are {empty:?} in place of {expected:?}"
        );
        guest.rmmod(setup.driver)
    })
}

/// Waits until `check` succeeds. Pages that compaction has just migrated out of the balloon stay marked until the device
/// has used the driver's message.
pub(crate) fn agree(guest: &Guest, check: impl Fn() -> Result<()>) -> Result<()> {
    let stopwatch = guest.stopwatch();
    loop {
        let is_over = stopwatch.has_passed(PATIENCE);
        match check() {
            Err(_) if !is_over => thread::sleep(Duration::from_millis(100)),
            result => return result,
        }
    }
}

fn target_changes(setup: &Setup) -> Result<()> {
    let (memory, span) =
        setup.by_speed((Size::gib(4), Size::gib(3)), (Size::gib(1), Size::mib(500)));
    vm::run(&setup.config().memory(memory), |guest| {
        let free = guest.free()?;
        guest.insmod(setup.driver, &[])?;
        let balloon = guest.balloon();
        let mut on_the_way = 0;
        for step in 0..50_u64 {
            // Steps of about the golden ratio go up and down, and never to the same target.
            let target = Size::pages(step * 618_034 % span.as_pages());
            let before = balloon.size()?;
            balloon.request(target)?;
            // A guest may reach the target at once, so every second target changes without a wait.
            let patience = Duration::from_millis(if step % 2 == 0 { 500 } else { 0 });
            let start = Instant::now();
            while balloon.size()? == before && start.elapsed() < patience {
                thread::sleep(Duration::from_millis(1));
            }
            on_the_way += usize::from(balloon.size()? != target);
        }
        ensure!(
            on_the_way > 0,
            "the guest reached each of 50 targets before the next one was set"
        );
        for size in [Size::mib(300), Size::default()] {
            balloon.settle(size)?;
            check_size(guest, size)?;
        }
        setup.note(format!(
            "{on_the_way} of 50 targets changed before they were reached"
        ));
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

fn target_beyond_memory(setup: &Setup) -> Result<()> {
    /// So long that the driver's next attempt is seconds away.
    const QUIET: Duration = Duration::from_secs(7);
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let mark = guest.console().mark()?;
        // The guest's kernel cannot inflate all of its memory.
        let balloon = guest.balloon();
        balloon.request(guest.memory() - Size::pages(1))?;
        let size = balloon.rest(QUIET)?;
        ensure!(
            size > Size::mib(600),
            "the balloon stops at {size}, although much more is available"
        );
        guest.run(&["true"])?;
        let kills = guest.vmstat("oom_kill")?;
        ensure!(
            kills == 0,
            "the balloon made the kernel kill {kills} processes"
        );
        let lines = guest.console().count_since(mark, "balloon")?;
        ensure!(
            lines <= 2,
            "the log got {lines} lines about a target out of reach"
        );

        let start = Instant::now();
        balloon.request(Size::mib(64))?;
        guest.wait_until("the balloon gets smaller", PATIENCE, || {
            Ok(balloon.size()? < size)
        })?;
        let reaction = start.elapsed();
        balloon.settle(Size::mib(64))?;
        check_size(guest, Size::mib(64))?;
        setup.note(format!(
            "{size} of {}, reaction after {reaction:.0?}",
            guest.memory()
        ));
        guest.rmmod(setup.driver)
    })
}

fn floor(setup: &Setup) -> Result<()> {
    for floor in [Size::mib(300), Size::default()] {
        vm::run(&setup.config(), |guest| {
            guest.insmod(setup.driver, &[&format!("floor_mib={}", floor.as_mib())])?;
            // Much of the memory that was just freed does not count as free.
            guest.touch(Size::mib(600))?;
            guest.balloon().request(guest.memory() - Size::pages(1))?;
            guest.balloon().rest(Duration::from_secs(3))?;
            let left = guest.meminfo()?.available;
            ensure!(
                left.abs_diff(floor) < Size::mib(24),
                "with a floor of {floor}, the balloon leaves {left}"
            );
            let listed = listed(guest)?;
            ensure!(
                floor == Size::default() || listed < Size::mib(8),
                "the balloon leaves {listed} that are not counted, and {left} that are"
            );
            if floor > Size::default() {
                check_retries(guest)?;
            }
            guest.balloon().settle(Size::default())?;
            guest.rmmod(setup.driver)
        })?;
    }
    Ok(())
}

/// Checks that the driver's next attempts at the reserve do not interrupt all processors in vain.
fn check_retries(guest: &Guest) -> Result<()> {
    let (_, drains) = guest.trace_drains(|| {
        // After a new target the driver tries at once, and twice more during this wait.
        guest.balloon().request(guest.memory() - Size::pages(2))?;
        thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    ensure!(
        drains == 0,
        "the per-CPU page lists were drained {drains} times, with hardly any pages on them"
    );
    Ok(())
}

/// Free memory that does not count as free: pages on per-CPU page lists.
fn listed(guest: &Guest) -> Result<Size> {
    let zones = guest.read_file("/proc/zoneinfo")?;
    let count = |line: &str| {
        line.trim_start()
            .strip_prefix("count:")?
            .trim()
            .parse::<u64>()
            .ok()
    };
    Ok(guest.page_size() * zones.lines().filter_map(count).sum::<u64>())
}

fn small_guest(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().memory(Size::mib(128)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        for size in [
            Size::mib(16),
            Size::pages(1),
            Size::mib(24),
            Size::default(),
        ] {
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        guest.balloon().request(guest.memory() - Size::pages(1))?;
        let size = guest.balloon().rest(Duration::from_secs(3))?;
        ensure!(
            size >= Size::mib(24),
            "the balloon stops at {size}, and has been larger"
        );
        ensure!(
            guest.vmstat("oom_kill")? == 0,
            "the balloon made the kernel kill a process"
        );
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Checks on both sides that the balloon has a size, rounded up to whole pages of the guest.
pub(crate) fn check_size(guest: &Guest, size: Size) -> Result<()> {
    let size = size.next_multiple_of(guest.page_size());
    let seen = guest.balloon().size()?;
    ensure!(
        seen == size,
        "the host sees a balloon of {seen}, and the target is {size}"
    );
    let pages = guest.page_size() * guest.vmstat("nr_balloon_pages")?;
    ensure!(
        pages == size,
        "the guest counts {pages} in balloons, and the target is {size}"
    );
    Ok(())
}

/// Checks that the guest has as much free memory as before, except for the kernel's own caches.
pub(crate) fn check_free(guest: &Guest, before: Size) -> Result<()> {
    let free = guest.free()?;
    let lost = before.saturating_sub(free);
    ensure!(
        lost < Size::mib(32),
        "the guest has {free} free, {lost} less than before"
    );
    Ok(())
}
