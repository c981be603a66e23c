// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon's memory: the host really gets it, and the guest keeps its data.

use std::ops::Range;

use anyhow::{Result, ensure};
use vm::{Load, PageFlag, Size};

use crate::compaction::{BLOCKS_OR_PAGES, fullest_block};
use crate::reporting::wait_until_taken;
use crate::scenario::{
    ALL_ARCHITECTURES, ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::check_size;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "memory_returned",
        proves: "the host gets the memory, and the guest can use it again afterwards",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: memory_returned,
    },
    Scenario {
        name: "data_intact",
        proves: "the guest's data stay intact while the balloon inflates and deflates",
        kernels: ALL_ARCHITECTURES,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: data_intact,
    },
    Scenario {
        name: "fragmented",
        proves: "the balloon inflates with order-0 pages where there are no free blocks",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: fragmented,
    },
    Scenario {
        name: "memory_error",
        proves: "the guest never reuses a page that had a memory error in the balloon",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: BLOCKS_OR_PAGES,
        run: memory_error,
    },
];

fn memory_returned(setup: &Setup) -> Result<()> {
    // Some of the memory that is left to the guest may be memory that it had used.
    let (used, size, tolerance) = (Size::mib(600), Size::mib(800), Size::mib(120));
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let touch = || -> Result<Size> {
            guest.touch(used)?;
            guest.resident()
        };
        let touched = touch()?;
        ensure!(
            touched > used,
            "QEMU has {touched} after the guest has used {used}"
        );
        guest.balloon().settle(size)?;
        let left = guest.resident()?;
        let given_back = touched.saturating_sub(left);
        ensure!(
            given_back + tolerance > used,
            "the host got {given_back} of the {used} that the guest had used"
        );
        guest.balloon().settle(Size::default())?;
        let again = touch()?;
        ensure!(
            again + tolerance > touched,
            "QEMU has {again} after the guest has used {used} again, and had {touched} before"
        );
        setup.note(format!(
            "QEMU had {touched}, {left} with a balloon of {size}, then {again}"
        ));
        guest.rmmod(setup.driver)
    })
}

fn data_intact(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let load = guest.load(Load::Hold {
            mib: 128,
            threads: 2,
        })?;
        let (mut rounds, mut passes) = (0, 0);
        while rounds < 10 || passes < 3 {
            guest.balloon().settle(Size::mib(400))?;
            guest.balloon().settle(Size::mib(50))?;
            rounds += 1;
            passes = load.status()?.progress.passes;
        }
        load.stop()?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        setup.note(format!(
            "the data were verified {passes} times while the balloon grew and shrank {rounds} times"
        ));
        guest.rmmod(setup.driver)
    })
}

fn fragmented(setup: &Setup) -> Result<()> {
    let size = Size::mib(150);
    // A process uses every other page of nearly all memory.
    vm::run(&setup.config().memory(Size::mib(768)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let free = guest.meminfo()?.free;
        let taken = free.saturating_sub(Size::mib(64));
        let load = guest.load(Load::Fragment {
            mib: usize::try_from(taken.as_mib())?,
        })?;
        let blocks = free_blocks(&guest.read_file("/proc/buddyinfo")?);
        ensure!(
            blocks < size,
            "{blocks} are free in blocks, so the guest is not fragmented"
        );
        guest.balloon().settle(size)?;
        check_size(guest, size)?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        load.stop()?;
        setup.note(format!("{blocks} were free in blocks of 64 KiB or more"));
        guest.rmmod(setup.driver)
    })
}

/// The free memory in blocks of 64 KiB or more, from /proc/buddyinfo: for each zone, after four
/// words, the number of free blocks of each order.
fn free_blocks(buddyinfo: &str) -> Size {
    let orders = |line: &str| -> Size {
        (0..)
            .zip(line.split_whitespace().skip(4))
            .skip(4)
            .map(|(order, count)| Size::pages(count.parse().unwrap_or(0) << order))
            .sum()
    };
    buddyinfo.lines().map(orders).sum()
}

fn memory_error(setup: &Setup) -> Result<()> {
    const FILE: &str = "/sys/devices/system/memory/hard_offline_page";
    let size = Size::mib(640);
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        guest.balloon().settle(size)?;
        let block = fullest_block(guest, ".")?;
        let Range { start, end } = block.pages;
        let pages = guest.offline_pages(Some(start..end))?;
        ensure!(
            pages == end - start,
            "no block is full of the balloon: at most {pages} of {} pages are in it",
            end - start
        );
        // The first and the last page of blocks, and one in between.
        let errors = [start, start + 1_300, end - 1];
        for page in errors {
            let address = (guest.page_size() * page).as_bytes();
            // The kernel fails the write, since the page is in use, and records the error.
            let _ = guest.write_file(FILE, &address.to_string());
        }
        let count = |flags: &[PageFlag]| guest.count_pages(start..end, flags);
        let noted = count(&[PageFlag::MemoryError])?;
        ensure!(
            noted == errors.len() as u64,
            "the kernel has recorded {noted} memory errors of {}",
            errors.len()
        );

        for _ in 0..2 {
            guest.balloon().settle(Size::default())?;
            let free = count(&[PageFlag::MemoryError, PageFlag::Buddy])?;
            let need = usize::try_from(guest.meminfo()?.available.as_mib() - 100)?;
            let load = guest.start_load(Load::Hog { mib: need })?;
            wait_until_taken(guest, &load, need)?;
            let mapped = count(&[PageFlag::MemoryError, PageFlag::Mapped])?;
            load.stop()?;
            ensure!(
                free == 0 && mapped == 0,
                "{free} pages with memory errors are free, and a process has mapped {mapped}"
            );
            guest.balloon().settle(size)?;
        }
        let noted = count(&[PageFlag::MemoryError])?;
        ensure!(
            noted == errors.len() as u64,
            "{noted} memory errors are left of {}",
            errors.len()
        );
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_blocks_are_counted_by_their_order() {
        let text = "Node 0, zone      DMA      5      9      9      9      1      0\n\
                    Node 0, zone   Normal      7      7      7      7      0      2\n";
        assert_eq!(free_blocks(text), Size::pages(16 + 2 * 32));
    }
}
