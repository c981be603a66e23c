// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Binding, unbinding, unloading and unplugging, at any moment: the guest gets all memory back.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vm::{Device, Driver, Guest, Size};

use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, CALLBACK_KERNELS, PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario,
    Setup,
};
use crate::sizes::{check_free, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "rmmod_full",
        proves: "unloading the module returns all memory to the guest, loading it inflates again",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: rmmod_full,
    },
    Scenario {
        name: "rmmod_while_watched",
        proves: "an open file of the driver holds the module, and not the device",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: rmmod_while_watched,
    },
    Scenario {
        name: "rebind",
        proves: "unbinding returns all memory to the guest, also while the balloon inflates",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: rebind,
    },
    Scenario {
        name: "unplug_while_inflating",
        proves: "a device can be unplugged at any moment, and another one plugged",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: unplug_while_inflating,
    },
    Scenario {
        name: "power_off_while_inflating",
        proves: "a guest powers off while its balloon inflates",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: power_off_while_inflating,
    },
];

fn rmmod_full(setup: &Setup) -> Result<()> {
    let size = Size::mib(500);
    vm::run(&setup.config(), |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        for _ in 0..2 {
            // The device keeps its target when the driver is unloaded.
            guest.insmod(setup.driver, &[])?;
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
            guest.rmmod(setup.driver)?;
            check_size(guest, Size::default())?;
            let now = guest.meminfo()?.total;
            ensure!(
                now == total,
                "the guest has {now} after the driver was unloaded, and had {total} before it was loaded"
            );
        }
        check_free(guest, free)
    })
}

fn rmmod_while_watched(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.wait_balloon()?;
        let (device, name) = (device(guest, setup.driver)?, setup.driver.name());
        let file = format!("/sys/kernel/debug/{name}-{device}/balloon");
        // The file is closed when the driver is unbound, and would otherwise be unloaded.
        let unloaded = guest.sh(&format!(
            "exec 3<{file}; echo {device} >{}/unbind; rmmod {name} 2>/dev/null && echo unloaded || echo loaded",
            driver_directory(setup.driver)
        ))?;
        ensure!(
            unloaded.trim_end() == "loaded",
            "the module is {unloaded} while one of its files is open"
        );
        guest.rmmod(setup.driver)
    })
}

fn rebind(setup: &Setup) -> Result<()> {
    let size = Size::mib(200);
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let directory = driver_directory(setup.driver);
        let device = device(guest, setup.driver)?;
        let free = guest.free()?;
        guest.balloon().settle(size)?;
        let mut full = 0;
        for round in 0..50 {
            // Every second time the balloon is full, otherwise it is still inflating.
            if round % 2 == 0 {
                guest.wait_until("a full balloon", PATIENCE, || {
                    Ok(guest.balloon().size()? == size)
                })?;
            } else {
                thread::sleep(Duration::from_millis(round));
            }
            full += usize::from(guest.balloon().size()? == size);
            guest.write_file(&format!("{directory}/unbind"), &device)?;
            check_size(guest, Size::default())
                .with_context(|| format!("after unbinding {round} times"))?;
            guest.write_file(&format!("{directory}/bind"), &device)?;
        }
        // With page sets it is full before the test can check.
        ensure!(
            full < 50 || setup.device == Device::Extended,
            "the balloon was always full before it was unbound"
        );
        // An empty balloon may not have started to inflate.
        guest.balloon().settle(size)?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        check_free(guest, free)?;
        guest.rmmod(setup.driver)
    })
}

/// Makes the balloon inflate to more than the guest has, and waits until it has begun: it then inflates, however late
/// the next step of a test comes. The driver reports the size to the host only at the end.
pub(crate) fn begin_inflating(guest: &Guest) -> Result<()> {
    guest.balloon().request(guest.memory() - Size::mib(1))?;
    guest.wait_until("an inflating balloon", PATIENCE, || {
        let size = guest.page_size() * guest.vmstat("nr_balloon_pages")?;
        Ok(size > Size::mib(100))
    })
}

/// Where the driver is found in sysfs.
pub(crate) fn driver_directory(driver: Driver) -> String {
    format!("/sys/bus/virtio/drivers/{}", driver.name())
}

/// The name of the device that a driver has.
pub(crate) fn device(guest: &Guest, driver: Driver) -> Result<String> {
    let links = guest.run(&["ls", &driver_directory(driver)])?;
    let device = links
        .split_whitespace()
        .find(|link| link.starts_with("virtio"));
    Ok(device.context("the driver has no device")?.to_owned())
}

fn unplug_while_inflating(setup: &Setup) -> Result<()> {
    let memory = setup.by_speed(Size::gib(4), Size::gib(1));
    let device = json!({ "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port0" });
    let config = setup
        .config()
        .memory(memory)
        .hotplug_port()
        .balloon(Some(&device.to_string()));
    vm::run(&config, |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        guest.insmod(setup.driver, &[])?;
        for round in 0..3 {
            if round > 0 {
                guest.plug_balloon(&device)?;
            }
            begin_inflating(guest)?;
            guest.unplug_balloon()?;
            let pages = guest.vmstat("nr_balloon_pages")?;
            ensure!(
                pages == 0,
                "{pages} pages are still in the balloon of an unplugged device"
            );
            let now = guest.meminfo()?.total;
            ensure!(now == total, "the guest had {total}, and has {now}");
        }
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

fn power_off_while_inflating(setup: &Setup) -> Result<()> {
    let memory = setup.by_speed(Size::gib(4), Size::gib(1));
    vm::run(&setup.config().memory(memory), |guest| {
        guest.insmod(setup.driver, &[])?;
        begin_inflating(guest)
    })
}
