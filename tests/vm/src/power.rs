// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Suspend, hibernation, reboot, and kexec, with a balloon.

use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use vm::{Config, Device, Guest, Load, Machine, RunningLoad, Size, Zeroing};

use crate::lifecycle::{begin_inflating, device};
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, CALLBACK_KERNELS, PATIENCE, RUST_DRIVER, Scenario, Setup,
    TEST_KERNEL,
};
use crate::sizes::{check_free, check_size};
use crate::statistics::{newer, poll};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "suspend_to_ram",
        proves: "a suspended guest has all of its memory, and inflates the balloon again after resume",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: suspend_to_ram,
    },
    Scenario {
        name: "suspend_while_inflating",
        proves: "a guest suspends while its balloon inflates, and continues to inflate after resume",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: suspend_while_inflating,
    },
    Scenario {
        name: "hibernate",
        proves: "a hibernated guest resumes in another QEMU, with its data, and with that QEMU's target",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: hibernate,
    },
    Scenario {
        name: "reboot",
        proves: "after a reboot with a full balloon both sides start with an empty one",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: reboot,
    },
    Scenario {
        name: "reboot_to_empty",
        proves: "the host sees that a guest has an empty balloon after a reboot",
        kernels: CALLBACK_KERNELS,
        // The C driver writes `actual` only when it inflates or deflates.
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: reboot_to_empty,
    },
    Scenario {
        name: "kexec",
        proves: "a kernel that is started by kexec while the balloon inflates has all memory",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: kexec,
    },
    Scenario {
        name: "crash_dump",
        proves: "a crash kernel does not inflate, and saves the memory of a guest with a full balloon",
        kernels: TEST_KERNEL,
        // The C driver inflates in a crash kernel, too.
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: crash_dump,
    },
    Scenario {
        name: "wakeup_source",
        proves: "the device keeps a guest awake while its balloon changes, if the user enables that, and no longer",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: wakeup_source,
    },
    Scenario {
        name: "wakeup_source_for_statistics",
        proves: "the guest stays awake until it has answered a request for statistics",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: wakeup_source_for_statistics,
    },
    Scenario {
        name: "wakeup_source_while_stuck",
        proves: "a balloon that cannot grow does not keep its guest awake",
        kernels: CALLBACK_KERNELS,
        // The C driver retries without end, and keeps its guest awake meanwhile.
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: wakeup_source_while_stuck,
    },
];

/// A balloon that is slow to inflate, and the memory for it.
fn large(setup: &Setup) -> (Config, Size) {
    let (memory, target) = setup.by_speed(
        (Size::gib(4), Size::gib(3)),
        (Size::gib(2), Size::mib(1200)),
    );
    let config = setup.config().memory(memory);
    (config, target)
}

/// Suspends the guest to RAM, sets `target`, if there is one, while it is suspended, and resumes
/// it.
fn sleep(guest: &Guest, target: Option<Size>) -> Result<()> {
    guest.suspend(|| {
        let size = guest.balloon().size()?;
        ensure!(
            size == Size::default(),
            "{size} are in the balloon of a suspended guest"
        );
        target.map_or(Ok(()), |target| guest.balloon().request(target))
    })
}

/// Waits until the balloon has reached `target`, and checks that the guest has the rest of `total`.
fn check_rest(guest: &Guest, total: Size, target: Size) -> Result<()> {
    guest.balloon().reach(target)?;
    check_size(guest, target)?;
    let now = guest.meminfo()?.total;
    ensure!(
        now + target == total,
        "the guest has {now} along with a balloon of {target}, and had {total} before"
    );
    Ok(())
}

/// Starts a process that holds data, and waits until it has written them.
fn hold(guest: &Guest) -> Result<RunningLoad<'_>> {
    let load = guest.load(Load::Hold {
        mib: 128,
        threads: 2,
    })?;
    Ok(load)
}

fn suspend_to_ram(setup: &Setup) -> Result<()> {
    let mut size = Size::mib(300);
    let targets = [
        None,
        Some(Size::mib(400)),
        None,
        Some(Size::mib(100)),
        Some(Size::default()),
    ];
    let config = setup.config().machine(Machine::I440fx);
    vm::run(&config, |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.insmod(setup.driver, &[])?;
        poll(guest)?;
        guest.balloon().settle(size)?;
        let load = hold(guest)?;
        for target in targets {
            sleep(guest, target)?;
            let awake = SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
            size = target.unwrap_or(size);
            check_rest(guest, total, size)?;
            load.verify(2)?;
            newer(guest, awake)?;
        }
        load.stop()?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

fn suspend_while_inflating(setup: &Setup) -> Result<()> {
    const ROUNDS: usize = 4;
    let (config, target) = large(setup);
    vm::run(&config.machine(Machine::I440fx), |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.insmod(setup.driver, &[])?;
        let load = hold(guest)?;
        for _ in 0..ROUNDS {
            begin_inflating(guest)?;
            sleep(guest, Some(target))?;
            check_rest(guest, total, target)?;
            guest.balloon().settle(Size::default())?;
        }
        load.verify(2)?;
        load.stop()?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

fn hibernate(setup: &Setup) -> Result<()> {
    let (before, after) = (Size::mib(400), Size::mib(500));
    let config = setup.config();
    let (hibernated, (total, load)) = vm::hibernate(&config, |guest| {
        let total = guest.meminfo()?.total;
        guest.insmod(setup.driver, &[])?;
        let load = hold(guest)?;
        guest.balloon().settle(before)?;
        Ok((total, load.id()))
    })?;
    hibernated.resume(after, |guest| {
        check_rest(guest, total, after)?;
        let load = guest.running(load);
        load.verify(2)?;
        for size in [before, Size::default()] {
            guest.balloon().settle(size)?;
            check_rest(guest, total, size)?;
        }
        load.verify(2)?;
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn reboot(setup: &Setup) -> Result<()> {
    let size = Size::mib(500);
    vm::run(&setup.config().reboots(), |guest| {
        let total = guest.meminfo()?.total;
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(size)?;
        for _ in 0..2 {
            guest.reboot()?;
            check_begins_anew(guest, total)?;
            // The device keeps its target, and the host sees the old size until the driver reports the
            // new one.
            guest.insmod(setup.driver, &[])?;
            guest.wait_until("a full balloon", PATIENCE, || {
                Ok(Size::pages(guest.vmstat("nr_balloon_pages")?) == size)
            })?;
            check_rest(guest, total, size)?;
        }
        guest.balloon().settle(Size::default())?;
        check_rest(guest, total, Size::default())?;
        guest.rmmod(setup.driver)
    })
}

fn reboot_to_empty(setup: &Setup) -> Result<()> {
    let size = Size::mib(500);
    vm::run(&setup.config().reboots(), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(size)?;
        guest.reboot()?;
        guest.balloon().request(Size::default())?;
        guest.insmod(setup.driver, &[])?;
        guest.balloon().reach(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Checks that a kernel that has just booted has no balloon.
fn check_begins_anew(guest: &Guest, total: Size) -> Result<()> {
    let (now, pages) = (guest.meminfo()?.total, guest.vmstat("nr_balloon_pages")?);
    ensure!(
        now.abs_diff(total) < Size::mib(1) && pages == 0,
        "the next kernel has {now} and {pages} pages in balloons, and the first one had {total}"
    );
    Ok(())
}

fn kexec(setup: &Setup) -> Result<()> {
    boot_by_kexec(setup, Zeroing::Off)
}

/// Starts another kernel by kexec while the balloon inflates, twice.
pub(crate) fn boot_by_kexec(setup: &Setup, zeroing: Zeroing) -> Result<()> {
    let (config, target) = large(setup);
    vm::run(&config.zeroing(zeroing).kexec(), |guest| {
        for _ in 0..2 {
            let total = guest.meminfo()?.total;
            guest.insmod(setup.driver, &[])?;
            guest.balloon().settle(Size::default())?;
            guest.load_kernel()?;
            begin_inflating(guest)?;
            guest.kexec()?;
            check_begins_anew(guest, total)?;
            guest.balloon().request(target)?;
            let (total, load) = (guest.meminfo()?.total, hold(guest)?);
            guest.insmod(setup.driver, &[])?;
            check_rest(guest, total, target)?;
            load.verify(2)?;
            load.stop()?;
            guest.rmmod(setup.driver)?;
        }
        Ok(())
    })
}

fn crash_dump(setup: &Setup) -> Result<()> {
    crash(setup, &setup.config(), |_| Ok(()))
}

/// Panics a guest with a full balloon after `prepare`, and reads its memory in the crash kernel.
pub(crate) fn crash(
    setup: &Setup,
    config: &Config,
    prepare: impl FnOnce(&Guest) -> Result<()>,
) -> Result<()> {
    // An emulated processor takes about a millisecond for each page of a dump.
    let (memory, reserved) = (Size::mib(512), Size::mib(128));
    let (used, size) = (Size::mib(220), Size::mib(150));
    let config = config
        .clone()
        .memory(memory)
        .kexec()
        .parameter(&format!("crashkernel={}M", reserved.as_mib()))
        .expect("sysrq triggered crash");
    vm::run(&config, |guest| {
        guest.load_crash_kernel()?;
        guest.insmod(setup.driver, &[])?;
        guest.touch(used)?;
        let total = guest.meminfo()?.total;
        guest.balloon().settle(size)?;
        prepare(guest)?;
        guest.panic()?;

        let before = guest.meminfo()?;
        ensure!(
            before.total < reserved,
            "a crash kernel with {} of {total}",
            before.total
        );
        guest.insmod(setup.driver, &[])?;
        // The host's target is still that of the crashed kernel.
        thread::sleep(Duration::from_secs(3));
        let now = guest.meminfo()?;
        ensure!(
            now.total == before.total && now.balloon == Size::default(),
            "the balloon of a crash kernel has {}",
            now.balloon
        );
        check_dump(setup, guest, total - reserved)?;
        guest.rmmod(setup.driver)
    })
}

/// Checks that a crash kernel can read at least `least` of the memory of the kernel before.
fn check_dump(setup: &Setup, guest: &Guest, least: Size) -> Result<()> {
    const DUMP: &str = "/proc/vmcore";
    let booted = guest.resident()?;
    let length = guest.run(&["stat", "-c", "%s", DUMP])?;
    let read = guest.exec_within(&["sh", "-c", &format!("cat {DUMP} | wc -c")], PATIENCE)?;
    ensure!(
        read.stdout == length && Size::bytes(length.trim().parse()?) >= least,
        "{} bytes of {length} were saved: {}",
        read.stdout,
        read.stderr
    );
    let dumped = guest.resident()?;
    setup.note(format!(
        "{} bytes were saved; QEMU had {booted} before, and {dumped} after",
        length.trim()
    ));
    // A page of private memory that is only read is the host's zero page. Shared memory has no
    // zero page.
    ensure!(
        setup.device != Device::Qemu || dumped < booted + Size::mib(64),
        "QEMU had {booted}, and {dumped} after the dump"
    );
    Ok(())
}

/// Allows the device to keep the guest awake, and returns the directory of its power management.
fn allow_wakeup(setup: &Setup, guest: &Guest) -> Result<String> {
    let device = device(guest, setup.driver)?;
    let power = format!("/sys/bus/virtio/devices/{device}/power");
    guest.write_file(&format!("{power}/wakeup"), "enabled")?;
    Ok(power)
}

fn wakeup_source(setup: &Setup) -> Result<()> {
    let (config, target) = large(setup);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(Size::mib(1))?;
        let power = allow_wakeup(setup, guest)?;
        for size in [target, Size::mib(1)] {
            check_rests(guest, &power)?;
            let before = times_awake(guest, &power)?;
            guest.balloon().settle(size)?;
            ensure!(
                times_awake(guest, &power)? > before,
                "the balloon has {size}, and the device has not kept the guest awake"
            );
        }
        check_rests(guest, &power)?;
        guest.rmmod(setup.driver)
    })
}

fn wakeup_source_for_statistics(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let power = allow_wakeup(setup, guest)?;
        check_rests(guest, &power)?;
        let before = times_awake(guest, &power)?;
        poll(guest)?;
        let sample = newer(guest, 0)?;
        newer(guest, sample.taken)?;
        let after = times_awake(guest, &power)?;
        ensure!(
            after >= before + 2,
            "the device has kept the guest awake {before} times, and {after} times after two answers"
        );
        check_rests(guest, &power)?;
        guest.rmmod(setup.driver)
    })
}

fn wakeup_source_while_stuck(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(Size::mib(1))?;
        let power = allow_wakeup(setup, guest)?;
        guest.balloon().request(guest.memory() - Size::pages(1))?;
        let size = guest.balloon().rest(Duration::from_secs(3))?;
        ensure!(size > Size::mib(1), "the balloon has not inflated at all");
        check_rests(guest, &power)?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// How many times the device has begun to keep the guest awake.
fn times_awake(guest: &Guest, power: &str) -> Result<u64> {
    let times = guest.read_file(&format!("{power}/wakeup_active_count"))?;
    Ok(times.trim_end().parse()?)
}

/// Whether the device keeps the guest awake.
fn is_active(guest: &Guest, power: &str) -> Result<bool> {
    Ok(guest
        .read_file(&format!("{power}/wakeup_active"))?
        .trim_end()
        == "1")
}

/// Checks that the device allows the guest to suspend, now or soon.
fn check_rests(guest: &Guest, power: &str) -> Result<()> {
    guest.wait_until(
        "a device that does not keep the guest awake",
        PATIENCE,
        || Ok(!is_active(guest, power)?),
    )
}
