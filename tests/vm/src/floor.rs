// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reserve that the driver leaves to the guest, and what the driver does when more memory is
//! available.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::NamedTempFile;
use vm::{Guest, Load, Size};

use crate::scenario::{PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "floor_by_size",
        proves: "without floor_mib the reserve depends on the guest's size",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        // The daemon itself limits the target.
        devices: QEMU_DEVICE,
        run: floor_by_size,
    },
    Scenario {
        name: "floor_and_programs",
        proves: "the balloon leaves the reserve and the page cache of mapped files to the guest",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        // The daemon itself limits the target.
        devices: QEMU_DEVICE,
        run: floor_and_programs,
    },
    Scenario {
        name: "memory_comes",
        proves: "8 GiB can be plugged into a guest of 1 GiB at its reserve, and a balloon below its target inflates with them",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: memory_comes,
    },
];

/// For how long the size of the balloon stays the same once the balloon is as large as possible.
const QUIET: Duration = Duration::from_secs(3);

/// How far the available memory may be from the reserve.
const NOISE: Size = Size::mib(24);

/// The size of the balloon in the guest. QEMU's number also contains plugged memory.
fn balloon(guest: &Guest) -> Result<Size> {
    Ok(guest.page_size() * guest.vmstat("nr_balloon_pages")?)
}

/// Sets all of the guest's memory as the target, and waits until the balloon stops inflating.
pub(crate) fn take_all(guest: &Guest) -> Result<Size> {
    guest.balloon().request(guest.memory() - Size::pages(1))?;
    guest.balloon().rest(QUIET)
}

fn floor_by_size(setup: &Setup) -> Result<()> {
    for (memory, floor) in [
        (Size::mib(512), Size::mib(168)),
        (Size::gib(1), Size::mib(232)),
        (Size::gib(8), Size::mib(744)),
    ] {
        vm::run(&setup.config().memory(memory), |guest| {
            guest.insmod(setup.driver, &[])?;
            let size = take_all(guest)?;
            let left = guest.meminfo()?.available;
            setup.note(format!("{size} of {memory}, {left} left"));
            ensure!(
                left.abs_diff(floor) < NOISE,
                "the balloon leaves {left} of {memory}, not {floor}"
            );
            guest.balloon().settle(Size::default())?;
            guest.rmmod(setup.driver)
        })?;
    }
    Ok(())
}

fn floor_and_programs(setup: &Setup) -> Result<()> {
    let (mapped, floor) = (Size::mib(300), Size::mib(100));
    let disk = NamedTempFile::new()?;
    disk.as_file().set_len(mapped.as_bytes())?;
    vm::run(&setup.config().read_only_disk(disk.path()), |guest| {
        guest.insmod(setup.driver, &[&format!("floor_mib={}", floor.as_mib())])?;
        let load = guest.load(Load::Map {
            mib: usize::try_from(mapped.as_mib())?,
        })?;
        let size = take_all(guest)?;
        let left = guest.meminfo()?.available;
        let faults = guest.vmstat("pgmajfault")?;
        load.verify(20)?;
        let faults = guest.vmstat("pgmajfault")? - faults;
        setup.note(format!("{size}, {left} left, {faults} major faults"));
        ensure!(
            left + NOISE > mapped + floor,
            "the balloon leaves {left}, of which {mapped} are mapped"
        );
        ensure!(faults < 100, "a process waits for the disk {faults} times");
        load.stop()?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

fn memory_comes(setup: &Setup) -> Result<()> {
    /// So long that the driver's next attempt would be seven seconds away, or more.
    const LONG: Duration = Duration::from_secs(15);
    /// A process in the guest sleeps for so long again and again. Its sleeps are the clock of this test: they stand still
    /// while the guest gets no processor.
    const SLEEP: Duration = Duration::from_millis(10);
    /// The driver looks for memory once a second.
    const LIMIT: Duration = Duration::from_secs(5);
    /// How much it takes at first, or more.
    const BEGUN: Size = Size::mib(16);
    let module = Size::gib(8);
    vm::run(&setup.config().memory_slot(module), |guest| {
        guest.insmod(setup.driver, &[])?;
        let load = guest.load(Load::Hold {
            mib: 150,
            threads: 1,
        })?;
        let clock = guest.load(Load::Tick {
            microseconds: SLEEP.as_micros().try_into()?,
        })?;
        let now = || anyhow::Ok(SLEEP * u32::try_from(clock.status()?.progress.passes)?);
        let size = take_all(guest)?;
        let grown = |from: Size, by: Size| {
            let start = now()?;
            let (mut took, mut has_begun) = (Duration::ZERO, false);
            guest.wait_until("a balloon that grows", PATIENCE, || {
                if !has_begun {
                    // The time comes first: a delay of this test between the two does not count.
                    took = now()? - start;
                    has_begun = balloon(guest)? >= from + BEGUN;
                }
                ensure!(
                    has_begun || took <= LIMIT,
                    "the balloon has not grown after {took:.1?} of the guest's time"
                );
                Ok(balloon(guest)? >= from + by)
            })?;
            anyhow::Ok(took)
        };

        thread::sleep(LONG);
        load.stop()?;
        let freed = grown(size, Size::mib(100))?;

        thread::sleep(LONG);
        let size = balloon(guest)?;
        guest.plug_memory(module)?;
        let plugged = grown(size, guest.memory() - Size::pages(1) - size)?;
        clock.stop()?;
        setup.note(format!(
            "the balloon began to take freed memory after {freed:.1?}, and plugged memory after {plugged:.1?}"
        ));
        guest.rmmod(setup.driver)
    })
}
