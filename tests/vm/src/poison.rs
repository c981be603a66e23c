// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose free pages hold a value: reported pages have that value again, or are not reported.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vm::{Config, Driver, Guest, Load, Machine, Offer, Size};

use crate::queues::{PAGE_POISON, REPORTING};
use crate::reporting::{FAST_REPORTS, at_rest, check_reporting, reported, take};
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup,
    TEST_KERNEL,
};
use crate::transports::accepted;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "poison_features",
        proves: "pages are reported only if the guest does not rely on their content, or the device knows it",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: poison_features,
    },
    Scenario {
        name: "poison_kept",
        proves: "free pages keep their value while they are reported, ballooned and used again",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: poison_kept,
    },
    // The C driver writes the value only on probe, and the device forgets it during a suspend.
    Scenario {
        name: "poison_after_resume",
        proves: "free pages keep their value also after a suspend",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: poison_after_resume,
    },
];

/// Makes the kernel check that free pages have not changed.
const POISON: &str = "page_poison=1";

/// Makes the kernel rely on zeroed free pages.
const ZERO: &str = "init_on_free=1";

fn poison_features(setup: &Setup) -> Result<()> {
    for parameter in [None, Some(ZERO), Some(POISON)] {
        let config = setup.config().hotplug_port().balloon(None);
        let config = match parameter {
            Some(parameter) => config.parameter(parameter),
            None => config,
        };
        vm::run(&config, |guest| {
            guest.insmod(setup.driver, &[])?;
            for (poison, reporting) in [(false, false), (false, true), (true, false), (true, true)]
            {
                let device = json!({
                    "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port0",
                    "page-poison": poison, "free-page-reporting": reporting,
                });
                guest.plug_balloon(&device)?;
                let has_value = parameter.is_some();
                for (feature, expected) in [
                    (PAGE_POISON, poison && has_value),
                    (REPORTING, reporting && (poison || !has_value)),
                ] {
                    ensure!(
                        accepted(guest, setup.driver, feature)? == expected,
                        "with {parameter:?}, feature {feature} of {device} is {}accepted",
                        if expected { "not " } else { "" }
                    );
                }
                guest.unplug_balloon()?;
            }
            guest.rmmod(setup.driver)
        })?;
    }
    Ok(())
}

fn config(setup: &Setup, parameter: &str) -> Config {
    setup
        .config()
        .parameter(parameter)
        .parameter(FAST_REPORTS)
        .offer(&[Offer::FreePageReporting, Offer::PagePoison])
}

fn poison_after_resume(setup: &Setup) -> Result<()> {
    let config = config(setup, POISON).machine(Machine::I440fx);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        for _ in 0..2 {
            use_and_report(setup, guest, POISON)?;
            guest.suspend(|| Ok(()))?;
        }
        use_and_report(setup, guest, POISON)?;
        guest.rmmod(setup.driver)
    })
}

fn poison_kept(setup: &Setup) -> Result<()> {
    for parameter in [ZERO, POISON] {
        vm::run(&config(setup, parameter), |guest| {
            guest.insmod(setup.driver, &[])?;
            ensure!(
                accepted(guest, setup.driver, REPORTING)?,
                "nothing is reported"
            );
            let data = guest.load(Load::Hold {
                mib: 64,
                threads: 1,
            })?;
            for _ in 0..3 {
                use_and_report(setup, guest, parameter)?;
                guest.balloon().settle(Size::mib(300))?;
                guest.balloon().settle(Size::default())?;
            }
            data.stop()?;
            guest.rmmod(setup.driver)
        })
        .with_context(|| format!("with {parameter}"))?;
    }
    Ok(())
}

/// Runs a process that uses memory, and waits until its memory is reported. The host can return
/// zeroed pages only, and has to keep pages with any other value. So the host's memory shows whether
/// it knows the value.
fn use_and_report(setup: &Setup, guest: &Guest, parameter: &str) -> Result<()> {
    let used = Size::mib(400);
    if parameter == ZERO {
        check_reporting(guest, used)?;
        return Ok(());
    }
    at_rest(guest)?;
    let before = reported(setup, guest)?;
    let load = take(guest, used)?;
    let peak = guest.resident()?;
    load.stop()?;
    match (setup.driver, before) {
        (Driver::Rust, Some(before)) => {
            guest.wait_until("all is reported", PATIENCE, || {
                let now = reported(setup, guest)?.unwrap_or_default();
                // Except pages on per-CPU page lists, and pages that are not in a block because of
                // those.
                Ok(now.saturating_sub(before) >= used - Size::mib(100))
            })?;
        }
        // The C driver has no counter. This is three times as long as it takes.
        _ => thread::sleep(Duration::from_secs(6)),
    }
    let left = guest.resident()?;
    ensure!(
        peak.saturating_sub(left) < Size::mib(32),
        "QEMU had {peak}, and has {left}, though it must not take pages that have a value"
    );
    Ok(())
}
