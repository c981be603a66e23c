// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every set of features that a device may offer works. Most features have a queue, and the offered
//! features determine the numbers of the queues.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vm::{Guest, Machine, Size};

use crate::reporting::{FAST_REPORTS, check_reporting};
use crate::scenario::{BOTH_DRIVERS, QEMU_DEVICE, Scenario, Setup, TEST_KERNEL};
use crate::sizes::check_size;
use crate::statistics::{newer, poll};
use crate::transports::accepted;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "feature_subsets",
        proves: "the balloon works with every set of features that a device may offer",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: feature_subsets,
    },
    Scenario {
        name: "feature_subsets_elsewhere",
        proves: "the same on devices from before virtio 1.0 and on virtio-mmio, for some sets",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: feature_subsets_elsewhere,
    },
];

/// A feature of a device: QEMU's name for it, and the bit.
struct Feature {
    name: &'static str,
    bit: usize,
}

const FEATURES: [Feature; 4] = [
    Feature {
        name: "deflate-on-oom",
        bit: 2,
    },
    Feature {
        name: "free-page-hint",
        bit: 3,
    },
    Feature {
        name: "page-poison",
        bit: PAGE_POISON,
    },
    Feature {
        name: "free-page-reporting",
        bit: REPORTING,
    },
];

pub(crate) const PAGE_POISON: usize = 4;
pub(crate) const REPORTING: usize = 5;

/// Which of the [`FEATURES`] a device offers: a bit for each, by its index there.
#[derive(Clone, Copy)]
struct Subset(usize);

impl Subset {
    const ALL: Self = Self((1 << FEATURES.len()) - 1);

    fn every() -> impl Iterator<Item = Self> {
        (0..=Self::ALL.0).map(Self)
    }

    /// The set of the features with these names.
    fn of(names: &[&str]) -> Self {
        let has = |feature: &Feature| usize::from(names.contains(&feature.name));
        Self(
            (0..)
                .zip(&FEATURES)
                .map(|(i, feature)| has(feature) << i)
                .sum(),
        )
    }

    /// The features, and whether each is in the set.
    fn features(self) -> impl Iterator<Item = (&'static Feature, bool)> {
        (0..)
            .zip(&FEATURES)
            .map(move |(i, feature)| (feature, (self.0 >> i) & 1 == 1))
    }

    fn names(self) -> Vec<&'static str> {
        self.features()
            .filter_map(|(feature, is_in)| is_in.then_some(feature.name))
            .collect()
    }

    /// Adds the features to the description of a device.
    fn offered_by(self, mut device: Value) -> Value {
        device["id"] = json!("balloon0");
        // Hints need it.
        device["iothread"] = json!("iothread0");
        for (feature, is_in) in self.features() {
            device[feature.name] = json!(is_in);
        }
        device
    }
}

fn feature_subsets(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .memory(Size::mib(512))
        .parameter(FAST_REPORTS)
        .hotplug_port()
        .balloon(None);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        for subset in Subset::every() {
            let device = json!({ "driver": "virtio-balloon-pci", "bus": "port0" });
            guest.plug_balloon(&subset.offered_by(device))?;
            exercise(setup, guest, subset)
                .with_context(|| format!("on a device that offers {:?}", subset.names()))?;
            guest.unplug_balloon()?;
        }
        guest.rmmod(setup.driver)
    })
}

fn feature_subsets_elsewhere(setup: &Setup) -> Result<()> {
    let subsets = [Subset::of(&["free-page-reporting"]), Subset::ALL];
    let transitional = json!({
        "driver": "virtio-balloon-pci", "disable-legacy": "off", "disable-modern": false
    });
    let legacy = json!({
        "driver": "virtio-balloon-pci", "disable-legacy": "off", "disable-modern": true
    });
    let mmio = json!({ "driver": "virtio-balloon-device" });
    for (machine, device) in [
        (Machine::Q35, transitional),
        (Machine::Q35, legacy),
        (Machine::Microvm, mmio),
    ] {
        for subset in subsets {
            let config = setup
                .config()
                .machine(machine)
                .memory(Size::mib(512))
                .parameter(FAST_REPORTS)
                .balloon(Some(&subset.offered_by(device.clone()).to_string()));
            vm::run(&config, |guest| {
                guest.insmod(setup.driver, &[])?;
                exercise(setup, guest, subset)?;
                guest.rmmod(setup.driver)
            })
            .with_context(|| format!("on {device} that offers {:?}", subset.names()))?;
        }
    }
    Ok(())
}

/// Uses every queue, except the one for hints, which is used only during a VM migration.
fn exercise(setup: &Setup, guest: &Guest, subset: Subset) -> Result<()> {
    for (feature, offered) in subset.features() {
        // The guest's free pages have no value that the host would have to keep.
        let expected = offered && feature.bit != PAGE_POISON;
        ensure!(
            accepted(guest, setup.driver, feature.bit)? == expected,
            "{} is {}accepted",
            feature.name,
            if expected { "not " } else { "" }
        );
    }
    for size in [Size::mib(100), Size::pages(1), Size::default()] {
        guest.balloon().settle(size)?;
        check_size(guest, size)?;
    }
    poll(guest)?;
    newer(guest, 0)?;
    if accepted(guest, setup.driver, REPORTING)? {
        check_reporting(guest, Size::mib(200))?;
    }
    Ok(())
}
