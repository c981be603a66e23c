// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KUnit: the module's own tests, which run in a guest when it is loaded.

use anyhow::Result;
use vm::ktap::{self, Case, Outcome};
use vm::{Artifacts, Config, Driver, Kernel, PATIENCE, Size};

use crate::cli::Guests;
use crate::kernel;
use crate::places::Places;
use crate::report::Report;
use crate::setup;

/// The kernels for KUnit without `KERNEL=`.
pub(crate) const KERNELS: [Kernel; 2] = [Kernel::Test, Kernel::Debug];

/// The text in the guest's log after the results.
const END: &str = "all suites have run";

/// Runs KUnit in one kernel, or in [`KERNELS`].
pub(crate) fn run(only: Option<Kernel>, guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let report = Report::new();
    for kernel in only.map_or(KERNELS.to_vec(), |kernel| vec![kernel]) {
        let artifacts = setup::prepare(&places, kernel)?;
        run_in(kernel, &artifacts, guests, &report);
    }
    Ok(report.conclude())
}

/// Runs KUnit in a guest with this kernel. Every case is a result.
pub(crate) fn run_in(kernel: Kernel, artifacts: &Artifacts, guests: Guests, report: &Report) {
    let name = |case: &str| format!("kunit {case} ({kernel} kernel)");
    // The suites allocate up to eight of the largest blocks at once, of 512 MiB with pages of 64 KiB. Several memory
    // blocks of 128 MiB must still be free when the suites have filled the memory for many times. With pages of 16 KiB a
    // per-CPU page list may keep a pageblock of 32 MiB. That must be less than the part of the memory from which the
    // driver drains the lists.
    let memory = match kernel {
        Kernel::Arm64Pages16k => Size::gib(3),
        Kernel::Arm64Pages64k => Size::gib(8),
        _ => Size::mib(1536),
    };
    let config = Config::new(artifacts, "kunit")
        .memory(memory)
        .accel(guests.accel())
        .verbose(guests.verbose)
        // A module is loaded when its suites have ended, and a suite may take minutes. KUnit has limits of its own.
        .parameter("sysctl.kernel.hung_task_timeout_secs=0")
        .parameter("kunit.enable=1")
        .parameter("kunit.autorun=1");
    let running = report.begin(&name("suites"));
    let log = config.logs();
    let result = vm::run(&config, |guest| {
        let mark = guest.console().mark()?;
        // Some cases allocate nearly all of the guest's memory.
        guest.insmod(Driver::Rust, &["floor_mib=32"])?;
        // The console may lag behind: this line follows all results.
        guest.write_file("/dev/kmsg", &format!("{END}\n"))?;
        guest.wait_until("the last results", PATIENCE, || {
            Ok(guest.console().count_since(mark, END)? > 0)
        })?;
        let cases = ktap::parse(&guest.console().text_since(mark)?);
        guest.rmmod(Driver::Rust)?;
        Ok(cases)
    });
    let (cases, whole) = match result {
        Ok(cases) => (cases, Outcome::Passed),
        Err(error) => {
            let reason = format!("{error:#}\nthe guest's log is in {}", log.display());
            (Vec::new(), Outcome::Failed(reason))
        }
    };
    for Case {
        name: case,
        outcome,
    } in cases
    {
        report.add(&name(&case), None, &outcome, &[]);
    }
    running.end(&whole, &[]);
}
