// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that stop using buffers: unbind, unplug and suspend end, and the guest keeps its memory.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm::{Driver, Exit, Guest, Hostile, Link, Machine, MemoryBackend, Size};

use crate::compaction::fullest_block;
use crate::hostile::NOISE;
use crate::lifecycle::{device, driver_directory};
use crate::reporting::{FAST_REPORTS, reported, take};
use crate::scenario::{
    BOTH_DRIVERS, BOTH_KERNELS, PATIENCE, QEMU_DEVICE, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::check_free;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "silent_device",
        proves: "unbind, unplug, suspend and shutdown end with a device that never uses a buffer",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: silent_device,
    },
    Scenario {
        name: "slow_device",
        proves: "they also end with a device that uses one buffer a second",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: slow_device,
    },
    Scenario {
        name: "silent_report",
        proves: "the system suspends although the device never returns a report of free pages",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: silent_report,
    },
    Scenario {
        name: "silent_report_floor",
        proves: "a report that the device never returns respects the reserve",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: silent_report_floor,
    },
    Scenario {
        name: "silent_offline",
        proves: "memory that an unresponsive or broken device holds stays online, and the attempt to take it offline fails",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: silent_offline,
    },
    Scenario {
        name: "oom_with_pending_migrations",
        proves: "pending page migrations do not keep a process from getting the other pages of the balloon",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: oom_with_pending_migrations,
    },
    Scenario {
        name: "vanished_device",
        proves: "unbind, unplug and shutdown end with a device that was pulled out",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: vanished_device,
    },
];

/// A device that returns reports for a while, and then holds one.
const REPORTS: [&str; 4] = ["--only", "falls-silent", "--offer", "free-page-reporting"];

/// The target of these devices.
const BALLOON: Size = Size::mib(128);

/// A way to stop using a device: its name, whether the guest then runs without the device, and the function that
/// does it while the guest has the device.
type Way = (&'static str, bool, fn(&Setup, &Guest) -> Result<()>);

const WAYS: [Way; 6] = [
    ("unbind", true, |setup, guest| {
        let device = device(guest, setup.driver)?;
        guest.write_file(
            &format!("{}/unbind", driver_directory(setup.driver)),
            &device,
        )
    }),
    ("rmmod", true, |setup, guest| guest.rmmod(setup.driver)),
    ("unplug", true, |_, guest| guest.unplug_balloon()),
    ("suspend and resume", false, |_, guest| {
        guest.suspend(|| Ok(()))
    }),
    ("reboot", false, |_, guest| guest.reboot()),
    ("shutdown", false, |_, guest| guest.shut_down()),
];

fn silent_device(setup: &Setup) -> Result<()> {
    leave(
        setup,
        &WAYS,
        Link::VhostUser,
        "silent",
        Duration::from_secs(6),
    )
}

fn slow_device(setup: &Setup) -> Result<()> {
    leave(
        setup,
        &WAYS,
        Link::VhostUser,
        "slow",
        Duration::from_secs(15),
    )
}

fn silent_report(setup: &Setup) -> Result<()> {
    /// The kernel gives up after 20 seconds.
    const LIMIT: Duration = Duration::from_secs(10);
    let config = setup
        .config()
        .machine(Machine::I440fx)
        .backend(MemoryBackend::Memfd)
        .balloon(None);
    let result = vm::run(&config, |guest| {
        let free = guest.free()?;
        guest.insmod(setup.driver, &[])?;
        let arguments = ["--only", "silent", "--offer", "free-page-reporting"];
        let device = Hostile::start(guest, Link::VhostUser, 0, &arguments)?;
        device.plug(guest, "pci.0")?;
        device.wait(guest)?;
        // The pages of a report do not count as free.
        let report = || guest.wait_until("a report", PATIENCE, || Ok(guest.free()? + NOISE < free));
        report()?;
        let start = guest.stopwatch();
        guest.suspend(|| Ok(()))?;
        let took = start.elapsed();
        setup.note(format!(
            "suspended and resumed in {:.1} s",
            took.as_secs_f64()
        ));
        ensure!(took < LIMIT, "suspending took {took:?}");
        // The driver does not start an unresponsive device again, unless it is bound again.
        let name = crate::lifecycle::device(guest, setup.driver)?;
        for file in ["unbind", "bind"] {
            let file = format!("{}/{file}", driver_directory(setup.driver));
            guest.write_file(&file, &name)?;
        }

        // The same again, and the system cancels the suspend at the last step.
        report()?;
        let mark = guest.console().mark()?;
        guest.write_file("/sys/power/pm_test", "freezer")?;
        guest.write_file("/sys/power/state", "mem")?;
        guest.wait_until(
            "a message about a device that was reset in vain",
            PATIENCE,
            || {
                Ok(guest
                    .console()
                    .count_since(mark, "the system did not suspend, and the device was reset")?
                    > 0)
            },
        )?;

        guest.unplug_balloon()?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    });
    setup.tolerate(result)
}

fn silent_report_floor(setup: &Setup) -> Result<()> {
    /// The reserve, and the tolerance: pages on the kernel's per-CPU page lists do not count as available. Without a
    /// reserve there are 50 MiB less than it.
    const FLOOR: Size = Size::mib(256);
    const SLACK: Size = Size::mib(24);
    let config = setup
        .config()
        .machine(Machine::I440fx)
        .parameter(FAST_REPORTS)
        .backend(MemoryBackend::Memfd)
        .balloon(None);
    let result = vm::run(&config, |guest| {
        guest.insmod(setup.driver, &["floor_mib=256"])?;
        let device = Hostile::start(guest, Link::VhostUser, 0, &REPORTS)?;
        device.plug(guest, "pci.0")?;
        device.wait(guest)?;
        settle_reports(setup, guest)?;
        device.turn()?;

        // One process leaves the guest with so much memory, and another one has used memory that
        // will be reported.
        let available = guest.meminfo()?.available;
        let rest = take(guest, available.saturating_sub(FLOOR + Size::mib(48)))?;
        take(guest, Size::mib(128))?.stop()?;
        let before = guest.meminfo()?.available;
        thread::sleep(Duration::from_secs(3));
        let left = guest.meminfo()?.available;
        setup.note(format!("{left} of {before} left"));
        ensure!(left + SLACK > FLOOR, "reports leave {left} of {before}");
        rest.stop()?;
        guest.unplug_balloon()?;
        guest.rmmod(setup.driver)
    });
    setup.tolerate(result)
}

/// Waits until the driver has inflated the balloon to the devices' target.
fn inflated(guest: &Guest) -> Result<()> {
    guest.wait_until("the balloon", PATIENCE, || {
        Ok(guest.vmstat("nr_balloon_pages")? >= BALLOON.as_pages())
    })
}

/// Waits until the device has returned the reports of all memory that is free. The C driver does not count them.
fn settle_reports(setup: &Setup, guest: &Guest) -> Result<()> {
    /// Between two reports there is less time.
    const QUIET: Duration = Duration::from_secs(3);
    const LIMIT: Duration = Duration::from_secs(60);
    let (mut last, mut since) = (Some(Size::default()), guest.stopwatch());
    guest.wait_until("the last report of free memory", LIMIT, || {
        let is_quiet = since.has_passed(QUIET);
        let now = reported(setup, guest)?;
        if now != last {
            (last, since) = (now, guest.stopwatch());
            return Ok(false);
        }
        Ok(is_quiet && now != Some(Size::default()))
    })
}

fn silent_offline(setup: &Setup) -> Result<()> {
    let messages = offline_with(setup, &[], &["--only", "silent"], |_, _| Ok(()));
    // The kernel would migrate pages of the balloon, which does not end either with an unresponsive
    // device.
    let empty: &[&str] = match setup.driver {
        Driver::C => &[],
        _ => &["inflate=0"],
    };
    let reports = offline_with(setup, empty, &REPORTS, |guest, device| {
        // The device has not held a report yet.
        settle_reports(setup, guest)?;
        device.turn()?;
        take(guest, Size::mib(300))?.stop().map(|_| ())
    });
    // The driver also refuses page migration once a queue is broken.
    let breaks = ["--only", "breaks", "--offer", "deflate-on-oom"];
    let broken = offline_with(setup, &[], &breaks, |guest, device| {
        inflated(guest)?;
        device.turn()
    });
    for result in [messages, reports, broken] {
        setup.tolerate(result)?;
    }
    Ok(())
}

/// Takes a block offline, if that is possible, and online again. Interrupts the kernel after a
/// timeout.
fn offline(guest: &Guest, block: &str) -> Result<bool> {
    /// The driver waits for two seconds.
    const LIMIT: Duration = Duration::from_secs(6);
    let state = block.replace("valid_zones", "state");
    let line = format!("echo offline >{state} && echo online_movable >{state}");
    let output = guest.exec_within(&["sh", "-c", &line], LIMIT)?;
    ensure!(
        matches!(output.exit, Exit::Status(_)),
        "'{line}' has not ended in {LIMIT:?}"
    );
    Ok(output.exit == Exit::Status(0))
}

/// Takes memory blocks offline while a device, which was plugged before `ask`, has pages of them.
fn offline_with(
    setup: &Setup,
    parameters: &[&str],
    arguments: &[&str],
    ask: impl Fn(&Guest, &Hostile) -> Result<()>,
) -> Result<()> {
    const BLOCKS: &str = "grep -l '^Movable' /sys/devices/system/memory/memory*/valid_zones";
    let config = setup
        .config()
        .machine(Machine::I440fx)
        .parameter("movablecore=512M")
        .parameter(FAST_REPORTS)
        .backend(MemoryBackend::Memfd)
        .balloon(None);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, parameters)?;
        // Before these zones were movable, the kernel allocated memory in some blocks that cannot
        // be migrated.
        let mut blocks = Vec::new();
        let listed = guest.sh(BLOCKS)?;
        for block in listed.lines() {
            if offline(guest, block)? {
                blocks.push(block);
            }
        }
        let device = Hostile::start(guest, Link::VhostUser, 0, arguments)?;
        device.plug(guest, "pci.0")?;
        device.wait(guest)?;
        ask(guest, &device)?;

        // The device may not have any pages yet.
        let (mut refused, mut longest) = (Vec::new(), Duration::ZERO);
        guest.wait_until("a block that stays online", PATIENCE, || {
            for block in &blocks {
                let start = guest.stopwatch();
                if !offline(guest, block)? {
                    refused.push(block);
                }
                longest = longest.max(start.elapsed());
            }
            Ok(!refused.is_empty())
        })?;
        setup.note(format!(
            "{} of {} blocks stay online, reported within {:.1} s",
            refused.len(),
            blocks.len(),
            longest.as_secs_f64()
        ));

        guest.unplug_balloon()?;
        for block in refused {
            ensure!(
                offline(guest, block)?,
                "{block} stays online without the device"
            );
        }
        guest.rmmod(setup.driver)
    })
}

fn oom_with_pending_migrations(setup: &Setup) -> Result<()> {
    /// How long the first migration may take.
    const MIGRATED: Duration = Duration::from_secs(60);
    /// More than the guest has without the balloon's memory.
    const NEED: Size = Size::mib(48);
    let config = setup
        .config()
        .machine(Machine::I440fx)
        .parameter("movablecore=512M")
        .backend(MemoryBackend::Memfd)
        .balloon(None);
    let result = vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        let arguments = ["--only", "falls-silent", "--offer", "deflate-on-oom"];
        let device = Hostile::start(guest, Link::VhostUser, 0, &arguments)?;
        device.plug(guest, "pci.0")?;
        device.wait(guest)?;
        inflated(guest)?;
        device.turn()?;

        // Starts migrating the balloon's pages out of a block. This does not end, since the number
        // of pending migrations is limited.
        let moved = guest.vmstat("balloon_migrate")?;
        let available = guest.meminfo()?.available;
        let block = fullest_block(guest, "^Movable")?;
        let line = format!(
            "count() {{ grep ^balloon_migrate /proc/vmstat; }}; before=$(count); echo offline >{} & \
             while [ \"$(count)\" = \"$before\" ]; do sleep 0.1; done; sleep 3; kill -9 $!; wait",
            block.state
        );
        guest.exec_within(&["sh", "-c", &line], MIGRATED)?;
        let moved = guest.vmstat("balloon_migrate")? - moved;
        ensure!(moved > 0, "no page of the balloon was migrated");
        guest.wait_until("the rest of the block", PATIENCE, || {
            Ok(guest.meminfo()?.available + NOISE > available)
        })?;

        let load = take(guest, guest.meminfo()?.available + NEED)?;
        load.stop()?;
        let left = Size::pages(guest.vmstat("nr_balloon_pages")?);
        setup.note(format!(
            "{moved} pages were migrated, and {left} of {BALLOON} left in the balloon"
        ));
        guest.unplug_balloon()?;
        guest.rmmod(setup.driver)
    });
    setup.tolerate(result)
}

fn vanished_device(setup: &Setup) -> Result<()> {
    // The virtio core resets a device before it resumes it, and the PCI transport waits for the reset. QEMU crashes on
    // a reboot.
    let ways: Vec<Way> = WAYS
        .into_iter()
        .filter(|(name, _, _)| !matches!(*name, "suspend and resume" | "reboot"))
        .collect();
    leave(setup, &ways, Link::VfioUser, "gone", Duration::from_secs(6))
}

/// Tries these ways to stop using a device that is `like` this. Each may take up to `limit`.
fn leave(setup: &Setup, ways: &[Way], link: Link, like: &str, limit: Duration) -> Result<()> {
    let config = setup
        .config()
        .machine(Machine::I440fx)
        .backend(MemoryBackend::Memfd)
        .balloon(None)
        .reboots();
    let config = match link {
        // The virtio core warns about a device that was not reset, even if the device is gone.
        Link::VfioUser => config.expect("WARNING: .*virtio.c:.* at virtio_dev_remove"),
        Link::VhostUser => config,
    };
    for &(name, goes_on, way) in ways {
        let took = Cell::new(None);
        let begun = Cell::new(false);
        let end = vm::run_and_kill(&config, |guest| {
            guest.insmod(setup.driver, &[])?;
            let device = Hostile::start(guest, link, 0, &["--only", like])?;
            device.plug(guest, "pci.0")?;
            device.wait(guest)?;
            // All buffers that the driver may have to wait for are in flight.
            thread::sleep(Duration::from_secs(3));
            if link == Link::VfioUser {
                // All registers of an absent device read as ones.
                let status = format!("cat {}/virtio*/status", driver_directory(setup.driver));
                guest.wait_until("a device that is gone", PATIENCE, || {
                    Ok(guest.sh(&status)? == "0x000000ff\n")
                })?;
            }
            begun.set(true);
            let start = guest.stopwatch();
            way(setup, guest)?;
            took.set(Some(start.elapsed()));
            if goes_on {
                let pages = guest.vmstat("nr_balloon_pages")?;
                ensure!(pages == 0, "{pages} pages went with the device");
            }
            Ok(())
        });
        let time = took.get().filter(|time| *time < limit);
        match setup.driver {
            Driver::C if begun.get() => {}
            _ => {
                end.with_context(|| format!("{name} on a {like} device"))?;
                ensure!(time.is_some(), "{name} takes {took:?}");
            }
        }
        setup.note(match time {
            Some(time) => format!("{name}: {:.1} s", time.as_secs_f64()),
            None => format!("{name}: not in {} s", limit.as_secs()),
        });
    }
    Ok(())
}
