// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How often the driver reads and writes the configuration space. Each access costs a VM exit, and QEMU aborts on it if
//! its vhost-user device has lost the back end.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Device, Driver, Guest, Size};

use crate::scenario::{ALL_DEVICES, BOTH_DRIVERS, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "configuration_accesses",
    proves: "a target costs a read and at most a write of the configuration space, whatever its size",
    kernels: TEST_KERNEL,
    drivers: BOTH_DRIVERS,
    devices: ALL_DEVICES,
    run: configuration_accesses,
}];

/// QEMU's trace events for reads and writes of the configuration space, for its own device and for a vhost-user
/// device.
fn events(device: Device) -> (&'static str, &'static str) {
    match device {
        Device::Qemu => ("virtio_balloon_get_config", "virtio_balloon_set_config"),
        Device::VhostUser | Device::Extended => {
            ("vhost_user_write req:24 ", "vhost_user_write req:25 ")
        }
    }
}

fn configuration_accesses(setup: &Setup) -> Result<()> {
    /// So long that all accesses for a target are over.
    const REST: Duration = Duration::from_millis(1500);
    let (read, write) = events(setup.device);
    let name = |event: &str| event.split(' ').next().unwrap_or_default().to_owned();
    let mut config = setup.config().memory(Size::gib(4));
    for event in [name(read), name(write)] {
        config = config.argument("-trace", &event);
    }
    let messages = setup.logs().join("qemu.log");
    let counts = || -> Result<[usize; 2]> {
        thread::sleep(REST);
        let text = fs::read_to_string(&messages)?;
        Ok([read, write].map(|event| text.matches(event).count()))
    };
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        // With that the accesses at the driver's beginning are over.
        guest.balloon().settle(Size::mib(2))?;
        let mut before = counts()?;
        let [reads, writes] = before;
        setup.note(format!("at the beginning: {reads} reads, {writes} writes"));
        ensure!(reads > 0, "QEMU's trace has no '{read}'");
        for size in [Size::mib(100), Size::gib(3), Size::mib(1), Size::default()] {
            let took = guest.balloon().settle(size)?;
            let now = counts()?;
            let [reads, writes] = [now[0] - before[0], now[1] - before[1]];
            before = now;
            let cost = format!("{size}: {reads} reads, {writes} writes");
            setup.note(cost.clone());
            // The driver writes once a second while the size changes, and when it is reached.
            let most = match setup.device {
                Device::Extended if setup.driver == Driver::Rust => 0,
                _ => usize::try_from(took.as_secs())? + 1,
            };
            let result = (|| {
                ensure!(reads <= 1 && writes <= most, "a target of {cost}");
                Ok(())
            })();
            setup.tolerate(result)?;
        }
        setup.tolerate(check_stuck(guest, counts))?;
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// A balloon that cannot inflate costs no accesses either.
fn check_stuck(guest: &Guest, counts: impl Fn() -> Result<[usize; 2]>) -> Result<()> {
    let target = guest.meminfo()?.total - Size::mib(1);
    guest.balloon().request(target)?;
    guest.balloon().rest(Duration::from_secs(3))?;
    let before = counts()?;
    thread::sleep(Duration::from_secs(5));
    let now = counts()?;
    let more = now[0] + now[1] - before[0] - before[1];
    ensure!(
        more == 0,
        "a target that is out of reach costs {more} accesses in 5 s"
    );
    Ok(())
}
