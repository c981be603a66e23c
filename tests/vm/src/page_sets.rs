// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benefits of page sets, compared with the base protocol.

use anyhow::{Result, ensure};
use vm::{Driver, Guest, HugePages, Load, MemoryBackend, Samples, Sent, Size};

use crate::scenario::{
    EXTENDED_DEVICE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL, TEST_KERNELS,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "page_sets_encodings",
        proves: "a guest describes its pages in the shorter encoding, fragmented or not",
        kernels: TEST_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: encodings,
    },
    Scenario {
        name: "page_sets_huge_pages",
        proves: "the host gets all memory of the balloon that is in huge pages",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: huge_pages,
    },
    Scenario {
        name: "page_sets_huge_pages_qemu",
        proves: "memory outside the balloon stays in the host's transparent huge pages, on QEMU's device, too",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: transparent_huge_pages,
    },
];

const RUNS: usize = 5;

/// The number of runs of half a minute each.
const FEWER_RUNS: usize = 3;

fn encodings(setup: &Setup) -> Result<()> {
    let config = setup.config().using_memory().memory(Size::gib(4));
    // Nearly all free memory, so that small blocks are included.
    let inflate = |guest: &Guest| -> Result<(Size, Sent)> {
        let size = guest.free()?.saturating_sub(Size::mib(256));
        let before = guest.sent()?;
        guest.balloon().settle(size)?;
        Ok((size, guest.sent()?.since(&before)))
    };
    let fresh = vm::run(&config, |guest| {
        guest.insmod(Driver::Rust, Driver::Rust.low_floor())?;
        inflate(guest)
    })?;
    let fragmented = vm::run(&config, |guest| {
        let _load = guest.fragment()?;
        guest.insmod(Driver::Rust, Driver::Rust.low_floor())?;
        inflate(guest)
    })?;
    let long_running = vm::run(&config, |guest| {
        guest.insmod(Driver::Rust, Driver::Rust.low_floor())?;
        let _loads = use_for_long(guest)?;
        inflate(guest)
    })?;
    for (guest, (size, sent)) in [
        ("fresh", &fresh),
        ("fragmented", &fragmented),
        ("long-running", &long_running),
    ] {
        setup.note(format!("{size} of a {guest} guest: {sent}"));
    }
    let (fresh, fragmented) = (fresh.1, fragmented.1);
    ensure!(
        fresh.encoded_as("bitmaps")? == 0,
        "a fresh guest sends bitmaps: {fresh}"
    );
    ensure!(
        fragmented.encoded_as("bitmaps")? > fragmented.encoded_as("ranges")?,
        "a fragmented guest sends hardly any bitmaps: {fragmented}"
    );
    Ok(())
}

/// Starts and ends processes until the free memory is fragmented by those that keep some.
fn use_for_long(guest: &Guest) -> Result<Vec<vm::RunningLoad<'_>>> {
    const ROUNDS: usize = 8;
    let mut kept = Vec::new();
    for round in 0..ROUNDS {
        let holes = guest.load(Load::Fragment { mib: 512 })?;
        let data = guest.load(Load::Hold {
            mib: 32,
            threads: 1,
        })?;
        // This allocates memory between that of the other processes.
        let more = guest.start_load(Load::Hog { mib: 64 })?;
        guest.touch(Size::mib(256))?;
        guest.sh("dd if=/dev/zero of=/tmp/file bs=1M count=64 && rm /tmp/file")?;
        more.stop()?;
        if round % 2 == 0 {
            holes.stop()?;
            kept.push(data);
        } else {
            data.stop()?;
            kept.push(holes);
        }
    }
    Ok(kept)
}

fn huge_pages(setup: &Setup) -> Result<()> {
    let (memory, size) = (Size::gib(2), Size::gib(1));
    let pages = HugePages::reserve(memory)?;
    let config = setup
        .config()
        .memory(memory)
        .backend(MemoryBackend::Hugetlb)
        .preallocated()
        .daemon_argument("--allow=hugetlb");
    // How much the host has before and after inflating.
    let measure = |driver| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let before = pages.free()?;
            guest.balloon().settle(size)?;
            Ok((before, pages.free()?))
        })
    };
    for run in 0..FEWER_RUNS {
        let ours = measure(Driver::Rust)?;
        let theirs = measure(Driver::C)?;
        if run == 0 {
            let came = |(before, after): (Size, Size)| after.saturating_sub(before);
            setup.note(format!(
                "of {size} in huge pages the host gets {}, and {} with the C driver",
                came(ours),
                came(theirs)
            ));
        }
        let (before, after) = ours;
        ensure!(
            after == before + size,
            "the host has {after} when {size} are in the balloon, and had {before}"
        );
    }
    Ok(())
}

fn transparent_huge_pages(setup: &Setup) -> Result<()> {
    /// The least part of the memory outside the balloon that has to be in huge pages.
    const LIMIT: f64 = 0.95;
    if !vm::has_transparent_huge_pages() {
        setup.skip("this machine does not back guests with transparent huge pages");
        return Ok(());
    }
    let (memory, size) = (Size::gib(8), Size::gib(4));
    let config = setup.config().memory(memory).preallocated();
    let measure = |driver, ratios: &mut Samples| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let before = guest.transparent_huge_pages()?;
            ensure!(
                before.as_bytes() as f64 >= memory.as_bytes() as f64 * LIMIT,
                "only {before} of the guest's memory are in huge pages at first"
            );
            guest.balloon().settle(size)?;
            let after = guest.transparent_huge_pages()?;
            ratios.add(after.as_bytes() as f64 / (memory - size).as_bytes() as f64);
            Ok(())
        })
    };
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for _ in 0..RUNS {
        measure(Driver::Rust, &mut ours)?;
        measure(Driver::C, &mut theirs)?;
    }
    setup.note(format!(
        "with {size} of {memory} in the balloon, {ours} of the rest is in huge pages, and {theirs} with the C driver"
    ));
    let ratio = ours.median();
    ensure!(
        ratio >= LIMIT,
        "{ratio:.3} of the rest is in huge pages, not {LIMIT}"
    );
    Ok(())
}
