// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long the kernel of a large guest disables interrupts or preemption.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use balloon_control::Request;
use vm::{Accel, Device, Driver, Exit, Guest, Kernel, Load, MemoryBackend, Off, Offer, Size};

use crate::compaction::{BLOCKS_OR_PAGES, MEMORY, fullest_block, write};
use crate::overwriting::unused;
use crate::scenario::{BOTH_DRIVERS, OOM, Scenario, Setup};
use crate::unused::ask;
use crate::vhost_user::wait_driver;

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "latency",
    proves: "a balloon in a guest of 64 GiB disables interrupts and preemption for 200,000 instructions at most, or not \
             for longer than the kernel does without a balloon",
    kernels: &[Kernel::Latency],
    drivers: BOTH_DRIVERS,
    devices: BLOCKS_OR_PAGES,
    run: latency,
}];

/// An operation that is measured.
type Work<'a> = &'a dyn Fn() -> Result<()>;

/// The limit for a section of the kernel, at a nanosecond for each instruction.
const LIMIT: Duration = Duration::from_micros(200);

/// The longest time in which the kernel takes 2,016 pages from a per-CPU page list, rounded up.
const LONGEST_DRAIN: Duration = Duration::from_micros(350);

/// The value that makes the kernel's per-CPU page lists as short as possible.
const SHORT_LISTS: &str = "1000000000";

/// The value for their default length.
const DEFAULT_LISTS: &str = "0";

fn latency(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .memory(Size::gib(64))
        // The memory is larger than the host's.
        .backend(MemoryBackend::Memfd)
        .offer(&[Offer::DeflateOnOom, Offer::FreePageHint])
        // The guest's clock counts the instructions of its only processor, so the speed and the load of the machine do
        // not matter.
        .accel(Accel::Tcg)
        .cpus(1)
        .argument("-icount", "shift=0")
        .parameter("tsc=reliable")
        .expect(OOM)
        .expect("Call Trace:");
    vm::run(&config, |guest| {
        for off in [Off::Interrupts, Off::Preemption] {
            measure(setup, guest, "nothing", off, || {
                thread::sleep(Duration::from_secs(5));
                Ok(())
            })?;
        }
        if setup.driver == Driver::Rust {
            rust_driver(setup, guest)?;
        }
        c_driver(setup, guest)
    })
}

/// Returns the longest section of the kernel with `off` disabled, during an operation.
fn measure(
    setup: &Setup,
    guest: &Guest,
    what: &str,
    off: Off,
    work: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let ((), section) = guest.trace_longest(off, work)?;
    setup.note(format!("{what}: {off:?} off for {section}"));
    Ok(section.time)
}

fn rust_driver(setup: &Setup, guest: &Guest) -> Result<()> {
    let mut too_long = Vec::new();
    for off in [Off::Interrupts, Off::Preemption] {
        let mut longest = Duration::ZERO;
        let measure = |what: &str, work: Work<'_>| measure(setup, guest, what, off, work);
        let offline = || offline(guest);
        let full = Size::gib(60);
        let settle = |size: Size| guest.balloon().settle(size).map(drop);

        // Under one hold of a lock the kernel puts up to 2,016 order-0 pages on a per-CPU page list: for a process, or
        // to migrate the balloon's pages. It takes as many from a list for a contiguous range of memory: for a gigantic
        // page, and for the driver. These sections are the longest. Short lists show the other long sections.
        guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "never")?;
        let process = measure("a process", &|| guest.touch(Size::gib(2)))?;
        let gigantic = measure("gigantic pages", &|| fill_lists(guest, &gigantic_page))?;
        let kernel_oom = out_of_memory(guest, &measure)?;
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let mut discarding = Duration::ZERO;
        if setup.device == Device::Extended {
            wait_driver(guest)?;
            let list = || fill_lists(guest, &list);
            longest = longest.max(measure("listing unused memory", &list)?);
            discarding = measure("discarding unused memory", &|| discard(guest))?;
            set_lists(guest, SHORT_LISTS)?;
            longest = longest.max(empty(guest, &measure)?);
            set_lists(guest, DEFAULT_LISTS)?;
        }
        longest = longest.max(measure("inflating", &|| settle(full))?);
        longest = longest.max(measure("offlining", &offline)?);
        set_lists(guest, SHORT_LISTS)?;
        longest = longest.max(measure("offlining with short lists", &offline)?);
        set_lists(guest, DEFAULT_LISTS)?;
        let oom = measure("running out of memory", &|| {
            guest.touch(Size::gib(5))?;
            ensure!(guest.balloon().size()? < full, "the balloon keeps {full}");
            Ok(())
        })?;
        longest = longest.max(measure("deflating", &|| settle(Size::default()))?);
        guest.rmmod(setup.driver)?;
        // To empty a list takes longer if more of its pages can merge. Other sections of a gigantic page do not count.
        let drain = LONGEST_DRAIN.min(gigantic * 3 / 2);
        // The same work does not always take exactly the same time.
        for (what, with, without) in [
            ("all else", longest, process),
            ("discarding unused memory", discarding, drain),
            ("running out of memory", oom, kernel_oom),
        ] {
            if with >= LIMIT.max(without * 11 / 10) {
                too_long.push(format!(
                    "{what}: {off:?} off for {with:?} with the driver, and for {without:?} without it"
                ));
            }
        }
    }
    ensure!(too_long.is_empty(), "{}", too_long.join("; "));
    Ok(())
}

/// Measures how a process runs out of memory in a guest whose other memory is offline, without a balloon.
fn out_of_memory(
    guest: &Guest,
    measure: &dyn Fn(&str, Work<'_>) -> Result<Duration>,
) -> Result<Duration> {
    const LEFT: Size = Size::gib(4);
    let take = format!(
        "cd {MEMORY} && for block in memory*; do
             [ $(awk '/^MemAvailable/ {{ print $2 }}' /proc/meminfo) -gt {} ] || break
             echo offline >$block/state
         done 2>/dev/null",
        LEFT.as_bytes() >> 10
    );
    guest.sh(&take)?;
    guest.write_file("/proc/sys/vm/overcommit_memory", "1")?;
    let longest = measure("a process that runs out of memory", &|| {
        // The kernel may not have taken all blocks offline.
        let mib = (guest.meminfo()?.available + Size::gib(3))
            .as_mib()
            .try_into()?;
        let status = guest.start_load(Load::Touch { mib })?.wait()?;
        ensure!(
            status.exit == Some(Exit::Signal(9)),
            "a process that needs {mib} MiB ends with {:?}",
            status.exit
        );
        Ok(())
    })?;
    guest.write_file("/proc/sys/vm/overcommit_memory", "0")?;
    guest.sh(&format!(
        "cd {MEMORY} && for block in $(grep -l offline memory*/state); do echo online >$block; done"
    ))?;
    Ok(longest)
}

/// Does `work` after processes of several sizes, which leave more or fewer pages on the per-CPU page lists.
fn fill_lists(guest: &Guest, work: &dyn Fn(&Guest) -> Result<()>) -> Result<()> {
    const PROCESSES: u64 = 8;
    (1..=PROCESSES).try_for_each(|process| {
        guest.touch(Size::mib(64 * process))?;
        work(guest)
    })
}

/// Makes the kernel allocate a gigantic page, and free it. Before, the kernel empties the lists.
fn gigantic_page(guest: &Guest) -> Result<()> {
    const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    guest.write_file(PAGES, "1")?;
    let pages = guest.read_file(PAGES)?;
    ensure!(pages.trim() == "1", "the kernel has {pages} gigantic pages");
    guest.write_file(PAGES, "0")
}

/// Lists unused memory.
fn list(guest: &Guest) -> Result<()> {
    ask(guest, &unused(4096)).map(drop)
}

/// Discards unused memory. Before, the kernel empties the per-CPU page lists, too.
fn discard(guest: &Guest) -> Result<()> {
    let all = Request::Reclaim {
        block: 2 << 20,
        start: 0,
        end: 0,
    };
    ask(guest, &all).map(drop)
}

/// Measures what the driver does with free memory while the balloon is empty and the per-CPU page lists are short.
/// Returns the longest section.
fn empty(guest: &Guest, measure: &dyn Fn(&str, Work<'_>) -> Result<Duration>) -> Result<Duration> {
    let discarding = measure("discarding unused memory with short lists", &|| {
        discard(guest)
    })?;
    let hints = measure("hints", &|| guest.hint_with(&*guest.daemon()?))?;
    Ok(discarding.max(hints))
}

fn c_driver(setup: &Setup, guest: &Guest) -> Result<()> {
    // With a larger balloon it would take an hour, and no page takes longer than the first ones.
    let size = Size::mib(512);
    guest.insmod(Driver::C, &[])?;
    for off in [Off::Interrupts, Off::Preemption] {
        for (what, size) in [("inflating", size), ("deflating", Size::default())] {
            measure(setup, guest, &format!("C driver, {what}"), off, || {
                guest.balloon().settle(size).map(drop)
            })?;
        }
    }
    guest.rmmod(Driver::C)
}

/// Sets the length of the kernel's per-CPU page lists.
fn set_lists(guest: &Guest, fraction: &str) -> Result<()> {
    guest.write_file("/proc/sys/vm/percpu_pagelist_high_fraction", fraction)
}

/// Takes a memory block that is full of balloon pages offline, and online again.
fn offline(guest: &Guest) -> Result<()> {
    let block = fullest_block(guest, ".")?;
    write(guest, &block.state, "offline")?;
    write(guest, &block.state, "online")
}
