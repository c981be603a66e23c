// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Contiguous allocations and memory offlining succeed in a guest with pages in the balloon.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm::{Device, Driver, Exit, Guest, Load, PageFlag, Size};

use crate::debugfs::{show, value};
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, CALLBACK_KERNELS, EXTENDED_DEVICE, FAST_KERNELS, PATIENCE,
    RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::{check_free, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "huge_pages",
        proves: "a guest full of single balloon pages gets as many huge pages as with the C driver",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: huge_pages,
    },
    Scenario {
        name: "gigantic_pages",
        proves: "a guest gets gigantic pages out of memory that is full of balloon pages",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: BLOCKS_OR_PAGES,
        run: gigantic_pages,
    },
    Scenario {
        name: "memory_offline",
        proves: "a memory block that is full of balloon pages can be taken offline",
        kernels: FAST_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: memory_offline,
    },
    Scenario {
        name: "blocks_offline",
        proves: "a memory block that is full of unsplit blocks of the balloon can be taken offline, too",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: blocks_offline,
    },
    Scenario {
        name: "virtio_mem",
        proves: "virtio-mem unplugs parts of memory that is full of balloon pages",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: BLOCKS_OR_PAGES,
        run: virtio_mem,
    },
    Scenario {
        name: "contiguous_allocation",
        proves: "an allocation from the contiguous memory allocator migrates pages of the balloon",
        kernels: FAST_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: BLOCKS_OR_PAGES,
        run: contiguous_allocation,
    },
];

/// A balloon with unsplit blocks, and one with order-0 pages.
pub(crate) const BLOCKS_OR_PAGES: &[Device] = &[Device::Extended, Device::Qemu];

/// The least share of huge pages, relative to the share with the C driver.
const HUGE_PAGES_LIMIT: f64 = 0.95;

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

fn huge_pages(setup: &Setup) -> Result<()> {
    let here = huge_pages_with(setup, setup.driver)?;
    if setup.driver == Driver::Rust {
        let c = huge_pages_with(setup, Driver::C)?;
        ensure!(
            here >= c * HUGE_PAGES_LIMIT,
            "the guest gets {here:.2} of its huge pages, and {c:.2} with the C driver"
        );
    }
    Ok(())
}

/// The share of the requested huge pages that a guest gets when the balloon has fragmented its
/// memory.
fn huge_pages_with(setup: &Setup, driver: Driver) -> Result<f64> {
    vm::run(&setup.config().memory(Size::mib(768)), |guest| {
        guest.insmod(driver, driver.low_floor())?;
        let free = guest.meminfo()?.free;
        let data = hold(guest)?;
        // A process has every other page, and the balloon gets the pages in between.
        let fragment = guest.load(Load::Fragment {
            mib: usize::try_from(free.saturating_sub(Size::mib(96)).as_mib())?,
        })?;
        let size = Size::mib(
            guest
                .meminfo()?
                .free
                .saturating_sub(Size::mib(128))
                .as_mib(),
        );
        guest.balloon().settle(size)?;
        fragment.stop()?;

        let moved = guest.vmstat("balloon_migrate")?;
        let free = guest.meminfo()?.free;
        let wanted = u32::try_from(free.saturating_sub(Size::mib(48)).as_mib() / 2)?;
        // The kernel defers compaction after a failed attempt, so the test starts it.
        write(guest, "/proc/sys/vm/compact_memory", "1")?;
        write(guest, NR_HUGEPAGES, &wanted.to_string())?;
        let got: u32 = guest.read_file(NR_HUGEPAGES)?.trim().parse()?;
        let moved = guest.vmstat("balloon_migrate")? - moved;
        setup.note(format!(
            "{driver:?} driver: {got} of {wanted} huge pages, {moved} of {} balloon pages migrated",
            size.as_pages()
        ));
        ensure!(
            moved > size.as_pages() / 10,
            "only {moved} pages of the balloon were migrated"
        );
        check_size(guest, size)?;
        data.stop()?;

        guest.write_file(NR_HUGEPAGES, "0")?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(driver)?;
        Ok(f64::from(got) / f64::from(wanted))
    })
}

/// Allocates a page of 1 GiB and frees it. Returns how many the kernel could allocate.
pub(crate) fn gigantic_page(guest: &Guest) -> Result<u64> {
    const NR_GIGANTIC: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    write(guest, NR_GIGANTIC, "1")?;
    let got = guest.read_file(NR_GIGANTIC)?.trim().parse()?;
    guest.write_file(NR_GIGANTIC, "0")?;
    Ok(got)
}

fn gigantic_pages(setup: &Setup) -> Result<()> {
    // The kernel's memory is at both ends of what is above 4 GiB, so only the second of three gibibytes can become
    // such a page. The balloon begins after the kernel's memory, and reaches into it.
    let size = Size::gib(1);
    vm::run(&setup.config().memory(Size::gib(5)), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let get = || gigantic_page(guest);
        ensure!(get()? == 1, "the guest gets none without a balloon");
        guest.balloon().settle(size)?;

        // The kernel migrates order-0 pages. Blocks leave, and the balloon inflates elsewhere.
        let event = match setup.driver == Driver::Rust && setup.device == Device::Extended {
            true => "balloon_deflate",
            false => "balloon_migrate",
        };
        let moved = guest.vmstat(event)?;
        if event == "balloon_deflate" {
            write(guest, "/proc/sys/vm/compact_memory", "1")?;
            let now = guest.vmstat(event)?;
            ensure!(now == moved, "compaction takes blocks from the balloon");
        }
        ensure!(get()? == 1, "the guest gets none with a balloon of {size}");
        let moved = guest.vmstat(event)? - moved;
        ensure!(moved > 0, "the balloon was not in the way");
        inflates_elsewhere(guest, size)?;
        setup.note(format!("{moved} pages of the balloon were in the way"));

        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Waits until a balloon that blocks have left has its size again. The device has not seen another one.
fn inflates_elsewhere(guest: &Guest, size: Size) -> Result<()> {
    guest.wait_until("a balloon that has inflated elsewhere", PATIENCE, || {
        Ok(guest.page_size() * guest.vmstat("nr_balloon_pages")? == size)
    })?;
    check_size(guest, size)
}

fn virtio_mem(setup: &Setup) -> Result<()> {
    let here = unplugged_with(setup, setup.driver)?;
    if setup.driver == Driver::Rust {
        let c = unplugged_with(setup, Driver::C)?;
        // The kernel allocates its own pages at random places.
        ensure!(
            here + Size::mib(32) >= c,
            "{here} are unplugged, and {c} with the C driver"
        );
    }
    Ok(())
}

/// How much plugged memory virtio-mem can unplug, part by part, from a guest with a balloon.
fn unplugged_with(setup: &Setup, driver: Driver) -> Result<Size> {
    // The guest has given up when it has made no progress for so long.
    const STUCK: Duration = Duration::from_secs(15);
    let more = Size::mib(512);
    let config = setup
        .config()
        .virtio_mem_with_balloon(more, "online_kernel");
    vm::run(&config, |guest| {
        guest.insmod(driver, driver.low_floor())?;
        guest.plug(more)?;
        let data = hold(guest)?;
        guest.balloon().settle(Size::mib(768))?;
        let unplugged = more - guest.plug_within(Size::default(), STUCK)?;
        setup.note(format!(
            "{driver:?} driver: {unplugged} of {more} unplugged"
        ));
        data.stop()?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(driver)?;
        Ok(unplugged)
    })
}

/// Starts a process that verifies its data.
fn hold(guest: &Guest) -> Result<vm::RunningLoad<'_>> {
    let data = guest.load(Load::Hold {
        mib: 32,
        threads: 1,
    })?;
    Ok(data)
}

/// Writes to a file of the guest's kernel that makes it migrate pages.
pub(crate) fn write(guest: &Guest, path: &str, value: &str) -> Result<()> {
    let line = format!("echo {value} >{path}");
    let output = guest.exec_within(&["sh", "-c", &line], PATIENCE)?;
    ensure!(
        output.exit == Exit::Status(0),
        "'{line}' ends with {:?} in the guest: {}",
        output.exit,
        output.stderr.trim_end()
    );
    Ok(())
}

fn memory_offline(setup: &Setup) -> Result<()> {
    // Nearly all memory: blocks come from other zones first.
    let size = Size::mib(736);
    vm::run(&setup.config().parameter("movablecore=512M"), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        let data = hold(guest)?;
        guest.balloon().settle(size)?;
        let with_balloon = guest.meminfo()?.total;

        let block = fullest_block(guest, "^Movable")?;
        let pages = guest.offline_pages(Some(block.pages.clone()))?;
        let all = block.pages.end - block.pages.start;
        ensure!(
            pages * 10 > all * 9,
            "no block is full of the balloon: at most {pages} pages of {all} are in it"
        );

        let moved = guest.vmstat("balloon_migrate")?;
        write(guest, &block.state, "offline")?;
        let state = guest.read_file(&block.state)?;
        ensure!(state.trim() == "offline", "the block is {}", state.trim());
        let moved = guest.vmstat("balloon_migrate")? - moved;
        ensure!(
            moved >= pages,
            "{moved} pages of the balloon were migrated, out of {pages} in the block"
        );
        check_size(guest, size)?;
        setup.note(format!("{moved} pages migrated out of a block of {all}"));

        write(guest, &block.state, "online_movable")?;
        let now = guest.meminfo()?.total;
        ensure!(
            now == with_balloon,
            "the guest has {now} with the block online again, and had {with_balloon} before"
        );
        data.stop()?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

/// A memory block that the guest's kernel can take offline.
pub(crate) struct Block {
    pub(crate) state: String,
    pub(crate) pages: Range<u64>,
}

pub(crate) const MEMORY: &str = "/sys/devices/system/memory";

/// The memory block with the most pages of the balloon, among the blocks whose zones match a
/// pattern.
pub(crate) fn fullest_block(guest: &Guest, zones: &str) -> Result<Block> {
    fullest_block_of(guest, MEMORY, zones, PageFlag::Offline)
}

/// The block with the most pages that have `flag`, among the blocks in a directory, such as that of a NUMA node.
pub(crate) fn fullest_block_of(
    guest: &Guest,
    directory: &str,
    zones: &str,
    flag: PageFlag,
) -> Result<Block> {
    let bytes = guest.read_file(&format!("{MEMORY}/block_size_bytes"))?;
    let pages = Size::bytes(u64::from_str_radix(bytes.trim(), 16)?).as_pages();
    let files = guest.sh(&format!(
        "grep -l '{zones}' {directory}/memory*/valid_zones"
    ))?;
    let mut blocks = Vec::new();
    for file in files.lines() {
        let directory = file.trim_end_matches("/valid_zones");
        let index = guest.read_file(&format!("{directory}/phys_index"))?;
        let first = u64::from_str_radix(index.trim(), 16)? * pages;
        blocks.push(Block {
            state: format!("{directory}/state"),
            pages: first..first + pages,
        });
    }
    // The last block has data that the kernel or the firmware allocated during boot.
    blocks.sort_by_key(|block| block.pages.start);
    blocks.pop();
    let mut fullest = None;
    for block in blocks {
        let full = guest.count_pages(block.pages.clone(), &[flag])?;
        if fullest.as_ref().is_none_or(|(most, _)| full > *most) {
            fullest = Some((full, block));
        }
    }
    let (_, block) = fullest.context("the guest has no such memory block")?;
    Ok(block)
}

fn blocks_offline(setup: &Setup) -> Result<()> {
    let size = Size::mib(640);
    vm::run(&setup.config().memory(Size::gib(2)), |guest| {
        guest.insmod(setup.driver, &[])?;
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.balloon().settle(size)?;
        let with_balloon = guest.meminfo()?.total;

        let block = fullest_block(guest, ".")?;
        let pages = guest.offline_pages(Some(block.pages.clone()))?;
        let all = block.pages.end - block.pages.start;
        ensure!(
            pages == all,
            "no block is full of the balloon: at most {pages} pages of {all} are in it"
        );

        let (_, events) = guest.trace_balloon(|| write(guest, &block.state, "offline"))?;
        ensure!(
            events
                .iter()
                .any(|event| event.ends_with("reason=isolated")),
            "no trace event for it: {events:#?}"
        );
        let state = guest.read_file(&block.state)?;
        ensure!(state.trim() == "offline", "the block is {}", state.trim());
        inflates_elsewhere(guest, size)?;

        write(guest, &block.state, "online")?;
        let now = guest.meminfo()?.total;
        ensure!(
            now == with_balloon,
            "the guest has {now} with the block online again, and had {with_balloon} before"
        );
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

/// Checks that the balloon has blocks from everywhere except an area of `area` pages.
fn check_blocks(guest: &Guest, area: u64) -> Result<()> {
    let balloon = show(guest, "balloon")?;
    let mut pages = 0;
    for order in 1..=10 {
        pages += value(&balloon, &format!("order_{order}_blocks"))? << order;
    }
    let elsewhere = guest.memory().as_pages() - area;
    ensure!(
        pages * 20 > elsewhere * 17,
        "{pages} pages of the balloon are in blocks, and {elsewhere} are outside the area"
    );
    Ok(())
}

fn contiguous_allocation(setup: &Setup) -> Result<()> {
    const AREA: &str = "/sys/kernel/debug/cma/hugetlb0";
    let wanted = Size::mib(64);
    // Unsplit blocks are not in the area, which the balloon uses last.
    let has_blocks = setup.driver == Driver::Rust && setup.device == Device::Extended;
    let parameters: &[&str] = if has_blocks { &["floor_mib=32"] } else { &[] };
    // Only the size of this area is a kernel parameter here, and it is 1 GiB at least.
    let config = setup
        .config()
        .memory(Size::gib(4))
        .parameter("hugetlb_cma=1G");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, parameters)?;
        let number = |file: &str| -> Result<u64> {
            Ok(guest.read_file(&format!("{AREA}/{file}"))?.trim().parse()?)
        };
        let used = number("used")?;
        let data = hold(guest)?;
        let size = if has_blocks {
            let size = Size::mib(guest.meminfo()?.available.as_mib() - 120);
            guest.balloon().settle(size)?;
            check_blocks(guest, number("count")?)?;
            // The kernel needs free memory outside the area to migrate pages: the balloon deflates
            // blocks first.
            size.saturating_sub(Size::mib(160))
        } else {
            Size::mib(2560)
        };
        guest.balloon().settle(size)?;
        let (free, all) = (guest.vmstat("nr_free_cma")?, number("count")?);
        let least = if has_blocks { 5 } else { 10 };
        ensure!(
            free * least < all,
            "the area is not full of the balloon: {free} pages of {all} are free"
        );

        let moved = guest.vmstat("balloon_migrate")?;
        let count = wanted.as_pages() + if has_blocks { free } else { 0 };
        write(guest, &format!("{AREA}/alloc"), &count.to_string())?;
        let moved = guest.vmstat("balloon_migrate")? - moved;
        let now = number("used")?;
        ensure!(
            now == used + count,
            "{now} pages of the area are in use, not {count} more than {used}"
        );
        // The allocation may contain the free pages, which need no migration.
        ensure!(
            moved * 2 > wanted.as_pages(),
            "{moved} pages of the balloon migrated for {count} contiguous pages"
        );
        check_size(guest, size)?;
        setup.note(format!("{moved} pages migrated for {count} adjacent pages"));

        write(guest, &format!("{AREA}/free"), &count.to_string())?;
        data.stop()?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)
    })
}
