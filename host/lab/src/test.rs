// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All tests: the host's own, KUnit in guests, and scenarios in guests.

use std::slice;
use std::sync::Arc;
use std::thread::{self, available_parallelism};

use anyhow::Result;
use scenarios::{SCENARIOS, Scenario, Setup};
use vm::ktap::Outcome;
use vm::{Architecture, Artifacts, Device, Driver, Kernel};

use crate::cli::Guests;
use crate::places::Places;
use crate::queue::{Feed, Queue};
use crate::report::Report;
use crate::{fuzz, host_tests, in_tree, kernel, kunit, setup};

/// For how long each fuzz target runs: enough for the inputs in the repository, and for small mutations
/// of them.
const FUZZ_SECONDS: u32 = 3;

/// Scenarios that also run in the debug kernel without `KERNEL=`: a selection that finds bugs which
/// the test kernel does not detect, in a short time. All scenarios run in their first kernel.
const DEBUG_SCENARIOS: &[&str] = &["inflate_deflate"];

/// Scenarios that take minutes, or are similar to a shorter one. They run by name, or with `make
/// test-long`.
const LONG_SCENARIOS: &[&str] = &[
    "soak",
    "unused_proof",
    "manager",
    "unused_lie",
    "hints_proof",
    "hints_lie",
    "unused_bounded",
    "reclaim",
    "snapshot",
    "page_sets_encodings",
    "page_sets_huge_pages_qemu",
    "failing_inflate",
    "failing_zeroing",
    "failing_deflate",
    "failing_request",
    "failing_probe",
    "failing_suspend",
    "silent_device",
    "slow_device",
    "vanished_device",
    "races",
    "random_kills",
    "service_kills",
    "free_page_reporting",
    "migrate_while_allocating",
    "poison_kept",
    "hostile_pci",
    "feature_subsets_elsewhere",
    "suspend_while_inflating",
    "page_sets_huge_pages",
    "silent_offline",
    "silent_report",
    "request_flood",
    "huge_pages",
    "virtio_mem",
    "latency",
    "zeroing_crash_dump",
    "zeroing_hibernate",
    "zeroing_hotplug",
    "feature_subsets",
    "service_restart",
];

/// Scenarios that run on all devices without `DEVICE=`. The other scenarios run on their first one.
const DEVICE_SCENARIOS: &[&str] = &[
    "inflate_deflate",
    "accounting",
    "data_intact",
    "memory_returned",
    "memory_error",
    "gigantic_pages",
    "contiguous_allocation",
    "statistics",
    "deflate_on_oom",
    "rebind",
    "races",
];

/// The selection.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// The kernel to run in, or those that each test is for.
    pub(crate) kernel: Option<Kernel>,
    /// A part of a scenario's name, or the name of another kind of test.
    pub(crate) only: Option<&'a str>,
    /// Whether to run long tests.
    pub(crate) long: bool,
    /// The driver that scenarios are run on.
    pub(crate) driver: Driver,
    /// The device that scenarios are run on, or those that each is for.
    pub(crate) device: Option<Device>,
}

/// Runs all selected tests, several at once. Returns whether all passed.
pub(crate) fn run(wanted: Wanted<'_>, guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let report = Report::new();
    let processors = available_parallelism()?.get();
    let queue = Queue::new(processors / 2);
    // Tests often wait: one more than there are CPUs keeps all of them busy.
    let lanes = processors + 1;
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| queue.work());
        }
        let preparation = Preparation {
            places: &places,
            wanted,
            guests,
            report: &report,
            queue: queue.feed(),
        };
        preparation.run()
    })?;
    Ok(report.conclude())
}

/// The builds, and the tests that they are for.
struct Preparation<'scope, 'wanted, 'queue> {
    places: &'scope Places,
    wanted: Wanted<'wanted>,
    guests: Guests,
    report: &'scope Report,
    queue: Feed<'queue, 'scope>,
}

impl Preparation<'_, '_, '_> {
    /// Builds the dependencies of the selected tests, and sends each test as soon as its dependencies exist. Tests
    /// without a guest run while the first kernel is built.
    fn run(self) -> Result<()> {
        let Wanted {
            kernel, only, long, ..
        } = self.wanted;
        if only.is_none_or(|only| only == "host") {
            self.queue_host_tests();
        }
        if only.map_or(long && kernel.is_none(), |only| only == "in-tree") {
            let result = in_tree::run(self.places, self.guests.accel(), self.report);
            self.report.add(
                "the driver in a kernel's source",
                None,
                &outcome(result),
                &[],
            );
        }
        Kernel::ALL.iter().try_for_each(|&this| self.prepare(this))
    }

    fn queue_host_tests(&self) {
        let (places, report) = (self.places, self.report);
        // The targets are built with instrumentation of their own, which takes minutes.
        let with_fuzzing = self.wanted.long && self.wanted.kernel.is_none();
        self.queue.push(move || {
            let mut result = host_tests::run(places, report);
            if with_fuzzing {
                result = result.and_then(|()| fuzz::fuzz(places, None, FUZZ_SECONDS, report));
            }
            if result.is_err() {
                report.add("host", None, &outcome(result), &[]);
            }
        });
    }

    /// Builds a kernel with its modules, and sends the tests that run in it.
    fn prepare(&self, this: Kernel) -> Result<()> {
        let (wanted, guests, report) = (self.wanted, self.guests, self.report);
        let is_debian = this == Kernel::Debian;
        let scenarios: Vec<_> = SCENARIOS
            .iter()
            .copied()
            .flatten()
            .filter(|scenario| is_wanted(scenario, this, wanted))
            .collect();
        let with_kunit = is_kunit_wanted(this, wanted);
        let is_selected = wanted.kernel.map_or(wanted.long, |kernel| kernel == this);
        let with_packages = is_debian && wanted.only.map_or(is_selected, |only| only == "packages");
        if scenarios.is_empty() && !with_kunit && !with_packages {
            return Ok(());
        }
        if !this.can_boot() {
            let result = self.queue.build(|| setup::compile(self.places, this));
            let name = format!("the module is compiled ({this} kernel)");
            report.add(&name, None, &outcome(result.map(drop)), &[]);
            return Ok(());
        }
        let prepared = self.queue.build(|| match is_debian {
            true => {
                setup::install(self.places).map(|(artifacts, system)| (artifacts, Some(system)))
            }
            false => setup::prepare(self.places, this).map(|artifacts| (artifacts, None)),
        });
        let (artifacts, packages) = match prepared {
            Ok((artifacts, packages)) => (Arc::new(artifacts), packages),
            Err(error) => {
                report.add(&preparation(this), None, &outcome(Err(error)), &[]);
                return Ok(());
            }
        };
        if let Some(packages) = packages {
            // Installing the packages is a test, too.
            report.add(&preparation(this), None, &Outcome::Passed, &[]);
            if with_packages {
                let result = self.queue.build(|| packages.test_packages(self.places));
                let name = format!("packages are upgraded and removed ({this} kernel)");
                report.add(&name, None, &outcome(result), &[]);
            }
        }
        if with_kunit {
            let artifacts = Arc::clone(&artifacts);
            // They take longest, so they must not begin last.
            self.queue
                .push_first(move || kunit::run_in(this, &artifacts, guests, report));
        }
        for scenario in scenarios {
            for &variant in &variants(scenario, this, wanted) {
                let artifacts = Arc::clone(&artifacts);
                self.queue
                    .push(move || run_scenario(scenario, variant, &artifacts, guests, report));
            }
        }
        Ok(())
    }
}

fn outcome(result: Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// The name of the preparation of a kernel's guests.
fn preparation(kernel: Kernel) -> String {
    match kernel {
        Kernel::Debian => "packages are installed (debian kernel)".to_owned(),
        _ => format!("a guest can be made ({kernel} kernel)"),
    }
}

fn is_wanted(scenario: &Scenario, this: Kernel, wanted: Wanted<'_>) -> bool {
    let Wanted {
        kernel, only, long, ..
    } = wanted;
    // Debian's system takes minutes to make.
    let is_ready = this != Kernel::Debian || only.is_some();
    let at_home = is_ready && scenario.kernels.first() == Some(&this)
        || this == Kernel::Debug && DEBUG_SCENARIOS.contains(&scenario.name);
    // Debian's kernel runs a few scenarios, and also long ones.
    let in_time = long || this == Kernel::Debian || !takes_long(scenario);
    // A scenario that is selected by name gets a note that it is not for this kernel.
    let is_for_it = scenario.kernels.contains(&this) || kernel.is_some() && only.is_some();
    is_for_it
        && kernel.map_or(long || at_home, |kernel| kernel == this)
        && only.map_or(in_time, |only| scenario.name.contains(only))
}

fn is_kunit_wanted(this: Kernel, wanted: Wanted<'_>) -> bool {
    let Wanted {
        kernel, only, long, ..
    } = wanted;
    this != Kernel::Debian
        && wanted.driver == Driver::Rust
        && wanted.device.is_none_or(|device| device == Device::Qemu)
        && kernel.map_or(long || kunit::KERNELS.contains(&this), |kernel| {
            kernel == this
        })
        && only.is_none_or(|only| only == "kunit")
}

/// A variant of a scenario: the kernel, the driver, the device, and whether the kernel zeroes
/// memory on allocation.
type Variant = (Kernel, Driver, Device, bool);

/// The selected variants of a scenario in one kernel.
fn variants(scenario: &Scenario, this: Kernel, wanted: Wanted<'_>) -> Vec<Variant> {
    let devices = wanted.device.as_ref().map(slice::from_ref);
    let own = match this {
        // One device is enough for the run that developers wait for.
        Kernel::Debug if wanted.kernel.is_none() && !wanted.long => &scenario.devices[..1],
        _ => devices_of(scenario),
    };
    // Debian's kernel zeroes memory by default.
    let zeroing: &[bool] = match this {
        Kernel::Debian => &[false, true],
        _ => &[false],
    };
    let devices = devices.unwrap_or(own).iter();
    devices
        .flat_map(|&device| zeroing.iter().map(move |&zeroing| (device, zeroing)))
        .map(|(device, zeroing)| (this, wanted.driver, device, zeroing))
        .collect()
}

/// The devices of a scenario without `DEVICE=`.
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

/// Whether a kernel's guests can use a device.
fn can_use(kernel: Kernel, device: Device) -> bool {
    let has_intx = |architecture: &Architecture| architecture.has_intx;
    device == Device::Qemu || kernel.foreign().is_none_or(has_intx)
}

/// Runs a scenario in one variant.
pub(crate) fn run_scenario(
    scenario: &Scenario,
    (kernel, driver, device, zeroing): Variant,
    artifacts: &Artifacts,
    guests: Guests,
    report: &Report,
) {
    let mut label = format!("{kernel} kernel");
    if driver == Driver::C {
        label += ", C driver";
    }
    if device != Device::Qemu {
        label += &format!(", {}", device.name());
    }
    if zeroing {
        label += ", zeroing";
    }
    let name = format!("scenario {} ({label})", scenario.name);
    let unfit = [
        (scenario.kernels.contains(&kernel), "kernel"),
        (scenario.drivers.contains(&driver), "driver"),
        (scenario.devices.contains(&device), "device"),
        (
            can_use(kernel, device),
            "device in this kernel: the board has no interrupt for it",
        ),
    ];
    if let Some((_, what)) = unfit.iter().find(|(is_for_it, _)| !is_for_it) {
        let outcome = Outcome::Skipped(format!("not for this {what}"));
        return report.add(&name, None, &outcome, &[]);
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
    let running = report.begin(&name);
    let outcome = match (scenario.run)(&setup) {
        Ok(()) => setup.skipped().map_or(Outcome::Passed, Outcome::Skipped),
        Err(error) => Outcome::Failed(format!(
            "{error:#}\nthe guest's log is in {}",
            setup.logs().display()
        )),
    };
    running.end(&outcome, &setup.notes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_name_scenarios() {
        let lists = [DEBUG_SCENARIOS, LONG_SCENARIOS, DEVICE_SCENARIOS];
        for name in lists.concat() {
            let mut all = SCENARIOS.iter().copied().flatten();
            assert!(all.any(|scenario| scenario.name == name), "{name}");
        }
    }
}
