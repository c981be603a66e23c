// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All tests: the host's own, KUnit in guests, and scenarios in guests.

use std::slice;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, available_parallelism};

use anyhow::{Result, anyhow};
use procfs::{Current, Meminfo};
use scenarios::{SCENARIOS, Scenario, Setup};
use vm::ktap::Outcome;
use vm::{Artifacts, Device, Driver, Kernel, Size};

use crate::places::Places;
use crate::report::Report;
use crate::{Guests, fuzz, host_tests, in_tree, kunit, setup};

/// For how long each fuzz target runs: enough for the inputs in the repository, and to find what is close
/// to them.
const FUZZ_SECONDS: u32 = 3;

/// What runs in the debug kernel as well when no kernel is asked for: enough to find what the test
/// kernel survives, in a time that one is ready to wait. All runs in the first kernel that it is for.
const DEBUG_SCENARIOS: &[&str] = &["inflate_deflate"];

/// What takes minutes, or is close to a scenario that takes less. It runs when it or everything is asked for.
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
    "random_kills",
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
    "latency",
];

/// How much memory a guest and what is around it may take.
const MEMORY_PER_LANE: Size = Size::gib(9);

/// What runs on all devices when none is asked for. The other scenarios run on the first one that they are for.
const DEVICE_SCENARIOS: &[&str] = &[
    "inflate_deflate",
    "accounting",
    "data_intact",
    "memory_returned",
    "statistics",
    "deflate_on_oom",
    "rebind",
    "races",
];

/// What is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// The kernel to run in, or those that each test is for.
    pub(crate) kernel: Option<Kernel>,
    /// What the name of a scenario has to have in it, or the name of another kind of test.
    pub(crate) only: Option<&'a str>,
    /// Whether it may take long.
    pub(crate) long: bool,
    /// The driver that scenarios are run on.
    pub(crate) driver: Driver,
    /// The device that scenarios are run on, or those that each is for.
    pub(crate) device: Option<Device>,
}

/// A test, or some that run in one place.
type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Runs all tests that are wanted, several at once. Says whether all is well.
pub(crate) fn run(wanted: Wanted<'_>, guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let report = Report::new();
    std::fs::create_dir_all(places.build())?;
    let (sender, jobs) = mpsc::channel();
    let jobs = Mutex::new(jobs);
    let lanes = lanes()?;
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| work(&jobs));
        }
        prepare(&places, wanted, guests, &report, sender)
    })?;
    Ok(report.conclude())
}

/// How many tests run at once: each guest has two processors, and may fill its memory.
fn lanes() -> Result<usize> {
    let meminfo = Meminfo::current()?;
    let available = meminfo.mem_available.unwrap_or(meminfo.mem_free);
    let fit = usize::try_from(available / MEMORY_PER_LANE.as_bytes())?;
    Ok(fit.clamp(1, available_parallelism()?.get()))
}

/// Does one job after the other until there will be no more.
fn work(jobs: &Mutex<Receiver<Job<'_>>>) {
    let next = || jobs.lock().expect("a lock").recv();
    while let Ok(job) = next() {
        job();
    }
}

/// Builds what the wanted tests need, and sends each of them as soon as that is there. What needs no guest is tested while
/// the first kernel is built.
fn prepare<'scope>(
    places: &'scope Places,
    wanted: Wanted<'_>,
    guests: Guests,
    report: &'scope Report,
    sender: Sender<Job<'scope>>,
) -> Result<()> {
    let Wanted {
        kernel, only, long, ..
    } = wanted;
    let send = move |job: Job<'scope>| {
        let sent = sender.send(job);
        sent.map_err(|_| anyhow!("no thread is left that runs tests"))
    };
    let outcome = |result: Result<()>| match result {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    if only.is_none_or(|only| only == "host") {
        send(Box::new(move || {
            let result = host_tests::run(places, report);
            let result = result.and_then(|()| fuzz::fuzz(places, None, FUZZ_SECONDS, report));
            if result.is_err() {
                report.add("host", None, &outcome(result), &[]);
            }
        }))?;
    }
    if only.map_or(long && kernel.is_none(), |only| only == "in-tree") {
        let result = in_tree::run(places, guests.accel(), report);
        report.add(
            "the driver in a kernel's source",
            None,
            &outcome(result),
            &[],
        );
    }
    for this in Kernel::ALL {
        let is_debian = this == Kernel::Debian;
        let scenarios: Vec<_> = SCENARIOS
            .iter()
            .copied()
            .flatten()
            .filter(|scenario| is_wanted(scenario, this, wanted))
            .collect();
        let with_kunit = is_kunit_wanted(this, wanted);
        let with_packages = is_debian && only == Some("packages");
        if scenarios.is_empty() && !with_kunit && !with_packages {
            continue;
        }
        let artifacts = match setup::prepare(places, this) {
            Ok(artifacts) => Arc::new(artifacts),
            Err(error) => {
                report.add(&prepared(this), None, &outcome(Err(error)), &[]);
                continue;
            }
        };
        if is_debian {
            // What the packages do is a test, too.
            report.add(&prepared(this), None, &Outcome::Passed, &[]);
        }
        if with_kunit {
            let artifacts = Arc::clone(&artifacts);
            send(Box::new(move || {
                kunit::run_in(this, &artifacts, guests, report);
            }))?;
        }
        // Whether memory is zeroed on allocation, as Debian's kernel does it by default.
        let zeroing: &[bool] = if is_debian { &[false, true] } else { &[false] };
        for scenario in scenarios {
            let devices = wanted.device.as_ref().map(slice::from_ref);
            let own = match this {
                // What one device shows of the driver is enough for the run that developers wait for.
                Kernel::Debug if kernel.is_none() && !long => &scenario.devices[..1],
                _ => devices_of(scenario),
            };
            for &device in devices.unwrap_or(own) {
                for &zeroing in zeroing {
                    let variant = (this, wanted.driver, device, zeroing);
                    let artifacts = Arc::clone(&artifacts);
                    send(Box::new(move || {
                        run_scenario(scenario, variant, &artifacts, guests, report);
                    }))?;
                }
            }
        }
    }
    Ok(())
}

/// What it is that makes the guests of a kernel ready.
fn prepared(kernel: Kernel) -> String {
    match kernel {
        Kernel::Debian => "packages are installed and removed (debian kernel)".to_owned(),
        _ => format!("a guest can be made ({kernel} kernel)"),
    }
}

fn is_wanted(scenario: &Scenario, this: Kernel, wanted: Wanted<'_>) -> bool {
    let Wanted {
        kernel, only, long, ..
    } = wanted;
    let at_home = scenario.kernels.first() == Some(&this)
        || this == Kernel::Debug && DEBUG_SCENARIOS.contains(&scenario.name);
    // Debian's kernel is for a few scenarios, and for those that take long, too.
    let in_time = long || this == Kernel::Debian || !takes_long(scenario);
    // Of one that is asked for it is said that it is not for this kernel.
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
