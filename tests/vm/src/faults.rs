// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults inside the guest: failed allocations, and hotplug of processors and memory.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balloon_control::{Begun, Progress, Request, RequestStatus};
use tempfile::NamedTempFile;
use vm::{Allocation, Config, Device, Driver, Guest, Load, Machine, RunningLoad, Size};

use crate::lifecycle::{device, driver_directory};
use crate::overwriting::unused;
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, CALLBACK_KERNELS, DEBUG_KERNEL, EXTENDED_DEVICE,
    RUST_DRIVER, Scenario, Setup, VHOST_USER_DEVICE,
};
use crate::sizes::{check_free, check_size};
use crate::unused::ask;
use crate::zeroing::{check_online, taken, zeroing};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "failing_inflate",
        proves: "whichever allocation fails, the balloon reaches a larger target",
        kernels: DEBUG_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: failing_inflate,
    },
    Scenario {
        name: "failing_zeroing",
        proves: "whichever allocation fails, the balloon reaches a larger target with memory blocks, and all are online",
        kernels: DEBUG_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: failing_zeroing,
    },
    Scenario {
        name: "failing_deflate",
        proves: "whichever allocation fails, the balloon reaches a smaller target",
        kernels: DEBUG_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: failing_deflate,
    },
    Scenario {
        name: "failing_request",
        proves: "whichever allocation fails, a request is completed or aborted",
        kernels: DEBUG_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: failing_request,
    },
    Scenario {
        name: "failing_probe",
        proves: "whichever allocation fails, the driver is loaded and bound, or can be later",
        kernels: DEBUG_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: failing_probe,
    },
    Scenario {
        name: "failing_suspend",
        proves: "whichever allocation fails, the guest resumes, and its balloon works or can be bound again",
        kernels: DEBUG_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: failing_suspend,
    },
    Scenario {
        name: "cgroup_pressure",
        proves: "processes that are short of memory lose no data while the balloon inflates and deflates",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: cgroup_pressure,
    },
    Scenario {
        name: "cpu_hotplug",
        proves: "ballooning works while processors are plugged and unplugged",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: cpu_hotplug,
    },
    Scenario {
        name: "memory_hotplug",
        proves: "the balloon inflates with plugged memory, and vacates it before it is unplugged",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        // QEMU's own device counts the memory module as a part of the balloon.
        devices: VHOST_USER_DEVICE,
        run: memory_hotplug,
    },
];

/// Enough for blocks, order-0 pages, and several messages.
const SIZE: Size = Size::mib(24);

/// Boots a guest and fails the allocations of `step`, one in each run, after `before`. Passes the
/// result of `step` to `check`.
fn fail_each<T>(
    setup: &Setup,
    config: &Config,
    before: impl Fn(&Guest) -> Result<()>,
    step: impl Fn(&Guest) -> T,
    check: impl Fn(&Guest, T) -> Result<()>,
) -> Result<()> {
    let result = vm::run(config, |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.insmod(setup.driver, &[])?;
        let mut all = 0;
        for kind in Allocation::ALL {
            let failed = guest.fail_each_allocation(
                kind,
                || before(guest),
                || step(guest),
                |outcome| {
                    check(guest, outcome)?;
                    // Whatever `step` returned, ballooning works.
                    guest.balloon().settle(SIZE)?;
                    check_size(guest, SIZE)?;
                    guest.balloon().settle(Size::default())?;
                    check_size(guest, Size::default())?;
                    let now = guest.meminfo()?.total;
                    ensure!(now == total, "the guest had {total}, and has {now}");
                    Ok(())
                },
            )?;
            setup.note(format!(
                "{kind}: {failed} allocations failed, one in each run"
            ));
            all += failed;
        }
        ensure!(all > 0, "no allocation has failed");
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    });
    setup.tolerate(result)
}

fn failing_probe(setup: &Setup) -> Result<()> {
    /// The memory that the driver's tasks allocate when they start.
    const BEGIN: Duration = Duration::from_millis(300);
    let refused = Cell::new(0);
    fail_each(
        setup,
        &setup.config(),
        |guest| guest.rmmod(setup.driver),
        |guest| {
            let loaded = guest.insmod(setup.driver, &[]);
            thread::sleep(BEGIN);
            loaded
        },
        |guest, loaded| {
            if loaded.is_err() {
                guest.insmod(setup.driver, &[])?;
            }
            if !guest.has_balloon()? {
                refused.set(refused.get() + 1);
                bind(guest, setup.driver)?;
            }
            match setup.device {
                Device::Extended => ask(guest, &unused(4096)).map(|_| ()),
                _ => Ok(()),
            }
        },
    )?;
    setup.note(format!("a device was refused {} times", refused.get()));
    Ok(())
}

/// Binds the driver to the balloon device that it has refused.
fn bind(guest: &Guest, driver: Driver) -> Result<()> {
    let name = guest.sh("cd /sys/bus/virtio/devices && grep -l '^0x0005' */device")?;
    let name = name.split('/').next().context("a device")?;
    guest.write_file(&format!("{}/bind", driver_directory(driver)), name)
}

fn failing_inflate(setup: &Setup) -> Result<()> {
    let size = match setup.driver {
        // The C driver allocates each page by itself.
        Driver::C => Size::mib(1),
        _ => SIZE,
    };
    fail_each(
        setup,
        &setup.config(),
        |_| Ok(()),
        |guest| guest.balloon().settle(size),
        |_, reached| reached.map(|_| ()),
    )
}

fn failing_zeroing(setup: &Setup) -> Result<()> {
    /// Enough for a memory block of 128 MiB.
    const BLOCK: Size = Size::mib(128);
    let config = zeroing(setup).memory(Size::gib(1));
    let blocks = Cell::new(0);
    fail_each(
        setup,
        &config,
        |_| Ok(()),
        |guest| guest.balloon().settle(BLOCK),
        |guest, reached| {
            reached?;
            blocks.set(taken(guest)?);
            check_online(guest)
        },
    )?;
    ensure!(blocks.get() > 0, "no memory block was taken");
    setup.note(format!("{} memory blocks were taken", blocks.get()));
    Ok(())
}

fn failing_deflate(setup: &Setup) -> Result<()> {
    /// Spread over so much memory that the driver has to allocate to sort it.
    const FULL: Size = Size::mib(256);
    fail_each(
        setup,
        &setup.config(),
        |guest| guest.balloon().settle(FULL).map(|_| ()),
        |guest| guest.balloon().settle(Size::default()),
        |_, reached| reached.map(|_| ()),
    )
}

fn failing_request(setup: &Setup) -> Result<()> {
    // Only a part of the memory: the driver pauses for ten times as long as a request has taken.
    let part = Size::mib(128).as_bytes();
    let requests = [
        Request::Unused {
            block: 4096,
            start: 0,
            end: part,
        },
        Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: part,
        },
        Request::DropCaches {
            pages: true,
            slab: true,
        },
    ];
    let aborted = Cell::new(0);
    // Each in a guest of its own, with a CPU time budget of its own.
    for request in requests {
        fail_each(
            setup,
            &setup.config(),
            |_| Ok(()),
            |guest| end(guest, &request),
            |_, outcome| match outcome?.status {
                RequestStatus::Complete => Ok(()),
                RequestStatus::Aborted => {
                    aborted.set(aborted.get() + 1);
                    Ok(())
                }
                other => bail!("the request ends with {other:?}"),
            },
        )
        .with_context(|| format!("{request:?}"))?;
    }
    setup.note(format!("{} requests were aborted", aborted.get()));
    Ok(())
}

/// Makes a request and waits for its end, with any status.
fn end(guest: &Guest, request: &Request) -> Result<Progress> {
    let daemon = guest.daemon()?;
    let begun: Begun = daemon.call(request)?;
    guest.end(&daemon, begun)
}

fn failing_suspend(setup: &Setup) -> Result<()> {
    let (slept, bound_again) = (Cell::new(0), Cell::new(0));
    fail_each(
        setup,
        &setup.config().machine(Machine::I440fx),
        |_| Ok(()),
        |guest| guest.suspend(|| Ok(())),
        |guest, outcome| {
            slept.set(slept.get() + usize::from(outcome.is_ok()));
            if !guest.has_balloon()? {
                bound_again.set(bound_again.get() + 1);
                let device = device(guest, setup.driver)?;
                let directory = driver_directory(setup.driver);
                for file in ["unbind", "bind"] {
                    guest.write_file(&format!("{directory}/{file}"), &device)?;
                }
            }
            Ok(())
        },
    )?;
    setup.note(format!(
        "the guest suspended {} times, and the driver was bound again {} times",
        slept.get(),
        bound_again.get()
    ));
    Ok(())
}

fn cgroup_pressure(setup: &Setup) -> Result<()> {
    const GROUP: &str = "/sys/fs/cgroup/short";
    let swap = NamedTempFile::new()?;
    swap.as_file().set_len(Size::gib(1).as_bytes())?;
    vm::run(&setup.config().disk(swap.path()), |guest| {
        guest.sh("mkswap /dev/vda && swapon /dev/vda")?;
        guest.sh(&format!(
            "echo +memory >/sys/fs/cgroup/cgroup.subtree_control && mkdir {GROUP} && echo 32M >{GROUP}/memory.high"
        ))?;
        guest.insmod(setup.driver, &[])?;
        let load = churn(guest, 96)?;
        guest.write_file(&format!("{GROUP}/cgroup.procs"), &load.id().0.to_string())?;
        let swapped = guest.vmstat("pswpout")?;
        let mut rounds = 0;
        while rounds < 10 || guest.vmstat("pswpout")? - swapped < 10_000 {
            for size in [Size::mib(500), Size::mib(50)] {
                guest.balloon().settle(size)?;
                check_size(guest, size)?;
            }
            rounds += 1;
        }
        let swapped = Size::pages(guest.vmstat("pswpout")? - swapped);
        load.verify(10)?;
        load.stop()?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        setup.note(format!(
            "{swapped} were swapped out while the balloon inflated and deflated {rounds} times"
        ));
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Starts processes that verify their data.
fn churn(guest: &Guest, mib: usize) -> Result<RunningLoad<'_>> {
    guest.load(Load::Churn {
        mib,
        threads: 2,
        seed: 0,
    })
}

fn cpu_hotplug(setup: &Setup) -> Result<()> {
    const ROUNDS: u64 = 20;
    vm::run(&setup.config(), |guest| {
        let free = guest.free()?;
        guest.insmod(setup.driver, &[])?;
        let load = churn(guest, 64)?;
        for round in 0..ROUNDS {
            for (online, size) in [("0", Size::mib(500)), ("1", Size::mib(50))] {
                guest.balloon().request(size)?;
                thread::sleep(Duration::from_millis(round * 5));
                guest.write_file("/sys/devices/system/cpu/cpu1/online", online)?;
                guest.balloon().reach(size)?;
                check_size(guest, size)?;
            }
        }
        load.verify(10)?;
        load.stop()?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

fn memory_hotplug(setup: &Setup) -> Result<()> {
    let module = Size::mib(512);
    vm::run(&setup.config().memory_slot(module), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        let load = churn(guest, 64)?;
        for _ in 0..3 {
            guest.balloon().settle(Size::mib(300))?;
            guest.plug_memory(module)?;
            // More than the guest has without the memory module, and then less.
            for size in [Size::mib(1100), Size::mib(500)] {
                guest.balloon().settle(size)?;
                check_size(guest, size)?;
            }
            guest.unplug_memory()?;
            guest.balloon().reach(Size::mib(500))?;
            check_size(guest, Size::mib(500))?;
        }
        load.verify(10)?;
        load.stop()?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        guest.rmmod(setup.driver)
    })
}
