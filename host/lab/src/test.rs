// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All tests: the host's own, KUnit in guests, and scenarios in guests.

use std::slice;

use anyhow::Result;
use scenarios::{SCENARIOS, Scenario, Setup};
use vm::ktap::Outcome;
use vm::{Artifacts, Device, Driver, Kernel};

use crate::places::Places;
use crate::report::Report;
use crate::{Guests, fuzz, host_tests, in_tree, kunit, setup};

/// For how long each fuzz target runs: enough for the inputs in the repository, and to find what is close
/// to them.
const FUZZ_SECONDS: u32 = 3;

/// What runs in the debug kernel as well when no kernel is asked for: enough to find what the test
/// kernel survives, in a time that one is ready to wait. All runs in the first kernel that it is for.
const DEBUG_SCENARIOS: &[&str] = &["inflate_deflate"];

/// What takes minutes, and runs when it or everything is asked for.
const LONG_SCENARIOS: &[&str] = &[
    "soak",
    "unused_proof",
    "unused_bounded",
    "reclaim",
    "snapshot",
    "page_sets_encodings",
    "page_sets_huge_pages_qemu",
    "failing_inflate",
    "failing_deflate",
    "failing_request",
    "failing_probe",
    "failing_suspend",
    "silent_device",
    "slow_device",
    "vanished_device",
    "races",
];

/// The result for installing and removing the packages.
const PACKAGES: &str = "packages are installed and removed (debian kernel)";

/// What runs on all devices when none is asked for. The other scenarios run on the first one that they are for.
const DEVICE_SCENARIOS: &[&str] = &[
    "inflate_deflate",
    "accounting",
    "data_intact",
    "memory_returned",
    "statistics",
    "deflate_on_oom",
    "reporting_and_ballooning",
    "suspend_to_ram",
    "rebind",
    "races",
];

/// Runs all tests that are asked for, or, if it may take `long`, every test in every kernel. Says whether
/// all is well.
pub(crate) fn run(
    kernel: Option<Kernel>,
    only: Option<&str>,
    long: bool,
    driver: Driver,
    device: Option<Device>,
    guests: Guests,
) -> Result<bool> {
    let places = Places::find()?;
    let mut report = Report::new();
    std::fs::create_dir_all(places.build())?;

    if only.is_none_or(|only| only == "host") {
        host_tests::run(&places, &mut report)?;
        fuzz::fuzz(&places, None, FUZZ_SECONDS, &mut report)?;
    }
    if only.map_or(long && kernel.is_none(), |only| only == "in-tree") {
        in_tree::run(&places, guests.accel(), &mut report)?;
    }
    for this in Kernel::ALL {
        let is_debian = this == Kernel::Debian;
        let wanted = |scenario: &&Scenario| {
            let at_home = scenario.kernels.first() == Some(&this)
                || this == Kernel::Debug && DEBUG_SCENARIOS.contains(&scenario.name);
            // Debian's kernel is for a few scenarios, and for those that take long, too.
            let in_time = long || is_debian || !takes_long(scenario);
            // Of one that is asked for it is said that it is not for this kernel.
            let is_for_it = scenario.kernels.contains(&this) || kernel.is_some() && only.is_some();
            is_for_it
                && kernel.map_or(long || at_home, |kernel| kernel == this)
                && only.map_or(in_time, |only| scenario.name.contains(only))
        };
        let scenarios: Vec<_> = SCENARIOS.iter().copied().flatten().filter(wanted).collect();
        let with_kunit = !is_debian
            && driver == Driver::Rust
            && device.is_none_or(|device| device == Device::Qemu)
            && kernel.map_or(long || kunit::KERNELS.contains(&this), |kernel| {
                kernel == this
            })
            && only.is_none_or(|only| only == "kunit");
        let with_packages = is_debian && only == Some("packages");
        if scenarios.is_empty() && !with_kunit && !with_packages {
            continue;
        }
        let artifacts = match setup::prepare(&places, this) {
            // What the packages do is a test, too.
            Err(error) if is_debian => {
                report.add(PACKAGES, None, &Outcome::Failed(format!("{error:#}")));
                continue;
            }
            artifacts => artifacts?,
        };
        if is_debian {
            report.add(PACKAGES, None, &Outcome::Passed);
        }
        // Whether memory is zeroed on allocation, as Debian's kernel does it by default.
        let zeroing: &[bool] = if is_debian { &[false, true] } else { &[false] };
        if with_kunit {
            kunit::run_in(this, &artifacts, guests, &mut report);
        }
        for scenario in scenarios {
            let devices = device.as_ref().map(slice::from_ref);
            for &device in devices.unwrap_or_else(|| devices_of(scenario)) {
                for &zeroing in zeroing {
                    let variant = (this, driver, device, zeroing);
                    run_scenario(scenario, variant, &artifacts, guests, &mut report);
                }
            }
        }
    }
    Ok(report.conclude())
}

/// The devices that a scenario runs on if none is asked for.
pub(crate) fn devices_of(scenario: &Scenario) -> &'static [Device] {
    match scenario.devices {
        [first, ..] if !DEVICE_SCENARIOS.contains(&scenario.name) => slice::from_ref(first),
        all => all,
    }
}

/// Whether a scenario takes minutes.
pub(crate) fn takes_long(scenario: &Scenario) -> bool {
    LONG_SCENARIOS.contains(&scenario.name)
}

/// Runs a scenario in one variant.
pub(crate) fn run_scenario(
    scenario: &Scenario,
    (kernel, driver, device, zeroing): (Kernel, Driver, Device, bool),
    artifacts: &Artifacts,
    guests: Guests,
    report: &mut Report,
) {
    let mut label = format!("{kernel} kernel");
    if driver == Driver::C {
        label += ", C driver";
    }
    label += match device {
        Device::Qemu => "",
        Device::VhostUser => ", vhost-user",
        Device::Extended => ", extended",
    };
    if zeroing {
        label += ", zeroing";
    }
    let name = format!("scenario {} ({label})", scenario.name);
    if !scenario.kernels.contains(&kernel) {
        return report.add(
            &name,
            None,
            &Outcome::Skipped("not for this kernel".to_owned()),
        );
    }
    if !scenario.drivers.contains(&driver) {
        return report.add(
            &name,
            None,
            &Outcome::Skipped("not for this driver".to_owned()),
        );
    }
    if !scenario.devices.contains(&device) {
        return report.add(
            &name,
            None,
            &Outcome::Skipped("not for this device".to_owned()),
        );
    }
    let setup = Setup::new(
        scenario,
        kernel,
        driver,
        device,
        artifacts,
        guests.accel(),
        guests.verbose,
    )
    .with_zeroing(zeroing)
    .with_seeds(guests.seeds())
    .with_time(guests.time());
    let start = report.begin(&format!("{name}: {}", scenario.proves));
    let outcome = match (scenario.run)(&setup) {
        Ok(()) => setup.skipped().map_or(Outcome::Passed, Outcome::Skipped),
        Err(error) => Outcome::Failed(format!(
            "{error:#}\nthe guest's log is in {}",
            setup.logs().display()
        )),
    };
    report.add(&name, Some(start.elapsed()), &outcome);
    for note in setup.notes() {
        report.print(&format!("        {note}"));
    }
}
