// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon works on every transport and with every virtqueue format.

use anyhow::{Context, Result, ensure};
use vm::{Config, Driver, Guest, Machine, Size};

use crate::scenario::{BOTH_DRIVERS, BOTH_KERNELS, QEMU_DEVICE, Scenario, Setup};
use crate::sizes::check_size;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "mmio",
        proves: "the balloon works on virtio-mmio",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: mmio,
    },
    Scenario {
        name: "legacy",
        proves: "the balloon works on a device from before virtio 1.0",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: legacy,
    },
    Scenario {
        name: "packed_queues",
        proves: "the balloon works with packed queues",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: packed_queues,
    },
    Scenario {
        name: "plain_queues",
        proves: "the balloon works without indirect descriptors and event indices",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: plain_queues,
    },
];

/// Bits of a device's features.
const F_RING_INDIRECT_DESC: usize = 28;
const F_VERSION_1: usize = 32;
const F_RING_PACKED: usize = 34;

fn mmio(setup: &Setup) -> Result<()> {
    let config = setup.config().machine(Machine::Microvm);
    inflate(
        setup,
        &config.argument("-global", "virtio-mmio.force-legacy=false"),
        F_VERSION_1,
        true,
    )
}

fn legacy(setup: &Setup) -> Result<()> {
    let device = "virtio-balloon-pci,id=balloon0,disable-legacy=off,disable-modern=on";
    inflate(
        setup,
        &setup.config().balloon(Some(device)),
        F_VERSION_1,
        false,
    )
}

fn packed_queues(setup: &Setup) -> Result<()> {
    let device = "virtio-balloon-pci,id=balloon0,packed=on";
    inflate(
        setup,
        &setup.config().balloon(Some(device)),
        F_RING_PACKED,
        true,
    )
}

fn plain_queues(setup: &Setup) -> Result<()> {
    let usual = "virtio-balloon-pci,id=balloon0";
    inflate(
        setup,
        &setup.config().balloon(Some(usual)),
        F_RING_INDIRECT_DESC,
        setup.driver == Driver::C,
    )?;
    let device = "virtio-balloon-pci,id=balloon0,indirect_desc=off,event_idx=off";
    inflate(
        setup,
        &setup.config().balloon(Some(device)),
        F_RING_INDIRECT_DESC,
        false,
    )
}

/// Whether a driver and its device have agreed on a feature.
pub(crate) fn accepted(guest: &Guest, driver: Driver, feature: usize) -> Result<bool> {
    let features = guest.sh(&format!(
        "cat /sys/bus/virtio/drivers/{}/virtio*/features",
        driver.name()
    ))?;
    let bit = features.as_bytes().get(feature);
    Ok(*bit.context("the driver has no device")? == b'1')
}

/// Inflates and deflates on a device that has a feature, or lacks it.
fn inflate(setup: &Setup, config: &Config, feature: usize, has_it: bool) -> Result<()> {
    vm::run(config, |guest| {
        guest.insmod(setup.driver, &[])?;
        ensure!(
            accepted(guest, setup.driver, feature)? == has_it,
            "feature {feature} does not match the test"
        );
        for size in [
            Size::mib(256),
            Size::pages(1),
            Size::mib(100),
            Size::default(),
        ] {
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        guest.rmmod(setup.driver)
    })
}
