// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon devices of other VMMs, as their source has them: each offers the features and queues of its VMM, and
//! fails the scenario at the first thing that the VMM does not accept.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balloon_control::Stat;
use vm::{Config, Driver, Guest, Load, MemoryBackend, Size, Vmm, Zeroing};

use crate::hostile::NOISE;
use crate::lifecycle::{device, driver_directory};
use crate::reporting::FAST_REPORTS;
use crate::scenario::{
    BOTH_DRIVERS, BOTH_KERNELS, PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::check_free;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "vmm_firecracker",
        proves: "the driver does only what Firecracker's device accepts, which discards hints on arrival",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: |setup| use_all(setup, "firecracker", FIRECRACKER),
    },
    Scenario {
        name: "vmm_firecracker_zeroing",
        proves: "hints are safe on a device that discards them on arrival where the kernel zeroes memory, too",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: |setup| {
            let config = setup.config().zeroing(Zeroing::On).memory(Size::gib(2));
            use_device(setup, config, "firecracker", FIRECRACKER)
        },
    },
    Scenario {
        name: "vmm_cloud_hypervisor",
        proves: "the driver does only what Cloud Hypervisor's device accepts",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: |setup| {
            use_all(
                setup,
                "cloud-hypervisor",
                Has {
                    statistics: false,
                    hints: false,
                },
            )
        },
    },
    Scenario {
        name: "vmm_crosvm",
        proves: "the driver does only what crosvm's device accepts, which numbers its queues by what it offers",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: |setup| {
            use_all(
                setup,
                "crosvm",
                Has {
                    statistics: true,
                    hints: false,
                },
            )
        },
    },
];

/// What only some of the devices have.
#[derive(Clone, Copy)]
struct Has {
    statistics: bool,
    hints: bool,
}

const FIRECRACKER: Has = Has {
    statistics: true,
    hints: true,
};

/// How much memory the guest uses and frees, so that it is reported.
const FREED: Size = Size::mib(200);

/// For how long the target is out of reach.
const QUIET: Duration = Duration::from_secs(1);

/// Plugs the device of the VMM with this name, and uses all that it has.
fn use_all(setup: &Setup, name: &str, has: Has) -> Result<()> {
    use_device(setup, setup.config(), name, has)
}

/// The same in a guest with `config`.
fn use_device(setup: &Setup, config: Config, name: &str, has: Has) -> Result<()> {
    let config = config
        .backend(MemoryBackend::Memfd)
        .hotplug_port()
        .balloon(None)
        .parameter(FAST_REPORTS);
    vm::run(&config, |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.insmod(setup.driver, &[])?;
        let load = guest.load(Load::Hold {
            mib: 64,
            threads: 1,
        })?;
        let vmm = Vmm::plug(guest, name, "port0")?;
        let used = || {
            follow_targets(setup, guest, &vmm)?;
            if has.statistics {
                check_statistics(guest, &vmm, total)?;
            }
            report(guest, &vmm)?;
            if has.hints {
                hint(guest, &vmm)?;
            }
            bind_again(setup, guest, &vmm, has)?;
            load.verify(1)
        };
        used().map_err(|error| vmm.explain(error))?;
        load.stop()?;

        let seen = vmm.seen()?;
        guest.unplug_balloon()?;
        guest.rmmod(setup.driver)?;
        let pages = guest.vmstat("nr_balloon_pages")?;
        ensure!(pages == 0, "{pages} pages went with the device");
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        check_free(guest, free)?;
        setup.note(format!(
            "{} messages: {} inflated, {} deflated, {} reported, {} hinted",
            seen.messages,
            Size::pages(seen.inflated),
            Size::pages(seen.deflated),
            Size::bytes(seen.reported),
            Size::bytes(seen.hinted)
        ));
        Ok(())
    })
}

/// Inflates and deflates, also to a target that is out of reach.
fn follow_targets(setup: &Setup, guest: &Guest, vmm: &Vmm<'_>) -> Result<()> {
    for size in [
        Size::mib(300) + Size::pages(257),
        Size::pages(1),
        Size::mib(100),
    ] {
        settle(guest, vmm, size)?;
    }
    // The C driver would take the memory that the guest's processes need.
    if setup.driver != Driver::C {
        vmm.request(guest.memory())?;
        guest.wait_until("most memory is in the balloon", PATIENCE, || {
            Ok(guest.page_size() * guest.vmstat("nr_balloon_pages")? > Size::mib(400))
        })?;
        // For some attempts to get more.
        thread::sleep(QUIET);
        let kills = guest.vmstat("oom_kill")?;
        ensure!(
            kills == 0,
            "the balloon made the kernel kill {kills} processes"
        );
    }
    settle(guest, vmm, Size::default())
}

/// Sets a target, and checks that both sides agree on the size.
fn settle(guest: &Guest, vmm: &Vmm<'_>, size: Size) -> Result<()> {
    vmm.settle(size)?;
    check_size(guest, size)
}

fn check_size(guest: &Guest, size: Size) -> Result<()> {
    let pages = guest.page_size() * guest.vmstat("nr_balloon_pages")?;
    ensure!(
        pages == size,
        "the guest counts {pages} in its balloon, and the target is {size}"
    );
    Ok(())
}

/// Uses and frees memory, and waits until the driver has reported as much.
fn report(guest: &Guest, vmm: &Vmm<'_>) -> Result<()> {
    let before = vmm.seen()?.reported;
    guest.touch(FREED)?;
    let more = FREED.as_bytes() / 2;
    vmm.wait("a report of the freed memory", |seen| {
        seen.reported >= before + more
    })?;
    Ok(())
}

/// Checks the statistics of a guest with this memory and an empty balloon.
fn check_statistics(guest: &Guest, vmm: &Vmm<'_>, total: Size) -> Result<()> {
    // The specification's tags.
    const FREE: u16 = 4;
    const TOTAL: u16 = 5;
    let statistic = |tag| {
        let statistics = vmm.statistics()?;
        ensure!(
            statistics.len() == Stat::ALL.len(),
            "{} statistics of {}",
            statistics.len(),
            Stat::ALL.len()
        );
        let bytes = statistics.get(&tag).copied();
        let bytes = bytes.with_context(|| format!("there is no statistic {tag}"))?;
        Ok(Size::bytes(bytes))
    };
    let there = statistic(TOTAL)?;
    ensure!(
        there.abs_diff(total) < NOISE,
        "the guest has {total}, and says {there} in its statistics"
    );
    // A report takes up to 128 MiB from the free lists until the device has used it.
    guest.wait_until("statistics that agree on free memory", PATIENCE, || {
        Ok(statistic(FREE)?.abs_diff(guest.meminfo()?.free) < NOISE)
    })
}

/// Hints in two rounds: one that the device ends when the driver does, and one that the test ends.
fn hint(guest: &Guest, vmm: &Vmm<'_>) -> Result<()> {
    let free = guest.free()?;
    let is_back = || {
        guest.wait_until("free memory as before", PATIENCE, || {
            Ok(guest.free()? + NOISE > free)
        })
    };
    vmm.hint(true)?;
    let seen = vmm.wait("the end of the hints", |seen| seen.host_hint == 1)?;
    ensure!(
        seen.hinted > FREED.as_bytes(),
        "the driver has hinted {}, and much more is free",
        Size::bytes(seen.hinted)
    );
    is_back()?;

    vmm.hint(false)?;
    // The end of the first round has the same id.
    let before = seen.hinted;
    vmm.wait("the driver's end of the hints", |seen| {
        seen.guest_hint == Some(0) && seen.hinted > before
    })?;
    let left = guest.free()?;
    ensure!(
        left + FREED < free,
        "{left} are free before the end of the hints, and {free} were before them"
    );
    vmm.end_hints()?;
    is_back()
}

/// Unbinds the driver and binds it again, and suspends the guest, all with a full balloon.
fn bind_again(setup: &Setup, guest: &Guest, vmm: &Vmm<'_>, has: Has) -> Result<()> {
    let size = Size::mib(200);
    settle(guest, vmm, size)?;
    let (directory, device) = (driver_directory(setup.driver), device(guest, setup.driver)?);
    guest.write_file(&format!("{directory}/unbind"), &device)?;
    check_size(guest, Size::default())?;
    guest.write_file(&format!("{directory}/bind"), &device)?;
    vmm.reach(size)?;
    check_size(guest, size)?;

    guest.suspend_devices()?;
    vmm.reach(size)?;
    check_size(guest, size)?;
    if has.statistics {
        vmm.statistics()?;
    }
    settle(guest, vmm, Size::default())
}
