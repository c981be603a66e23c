// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that runs out of memory gets it from the balloon, where the host allows it.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Guest, Load, RunningLoad, Size};

use crate::{BOTH_DRIVERS, BOTH_KERNELS, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "deflate_on_oom",
        proves: "a process that needs more than is left lives, because the balloon deflates",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        run: deflate_on_oom,
    },
    Scenario {
        name: "no_deflate_on_oom",
        proves: "without the feature the balloon stays, and the process is killed",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        run: no_deflate_on_oom,
    },
    Scenario {
        name: "no_swing_after_oom",
        proves: "memory that was given back to a process in need is not taken again at once",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        run: no_swing_after_oom,
    },
];

const BALLOON: Size = Size::mib(700);

/// More than is left beside the balloon in a guest of 1 GiB, and less than there is without it.
const NEED: Size = Size::mib(600);

/// How long a process may take to get its memory, or to be killed for it.
const PATIENCE: Duration = Duration::from_secs(120);

const ON: &str = "virtio-balloon-pci,id=balloon0,deflate-on-oom=on";

/// The kernel's words when it looks for memory, and when it kills.
const OOM: &str = "invoked oom-killer|Out of memory";

/// Starts a process that takes [`NEED`].
fn start(guest: &Guest) -> Result<RunningLoad<'_>> {
    guest.load(Load::Hog {
        mib: usize::try_from(NEED.as_mib())?,
    })
}

/// Starts a process that takes [`NEED`], and waits until it has all of it.
fn start_and_wait(guest: &Guest) -> Result<RunningLoad<'_>> {
    let load = start(guest)?;
    guest.wait_until("a process has the memory it needs", PATIENCE, || {
        let status = load.status()?;
        ensure!(
            status.exit.is_none(),
            "it ended with {:?} at {} MiB",
            status.exit,
            status.progress.mib
        );
        Ok(status.progress.mib as u64 >= NEED.as_mib())
    })?;
    Ok(load)
}

fn deflate_on_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().balloon(Some(ON)), |guest| {
        guest.insmod(setup.driver, &[])?;
        let total = guest.meminfo()?.total;
        guest.balloon().settle(BALLOON)?;
        let with_balloon = guest.meminfo()?.total;
        ensure!(
            with_balloon == total,
            "memory that can come back counts as the guest's: {with_balloon} of {total}"
        );

        let load = start_and_wait(guest)?;
        let left = guest.balloon().size()?;
        ensure!(
            left < BALLOON,
            "the balloon still has {left}, although the guest needed {NEED}"
        );
        setup.note(format!("{left} of {BALLOON} left in the balloon"));
        load.stop()?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        guest.rmmod(setup.driver)
    })
}

fn no_deflate_on_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().expect(OOM), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(BALLOON)?;
        start(guest)?.wait(PATIENCE)?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(
            killed == 1,
            "{killed} processes were killed in place of one"
        );
        let left = guest.balloon().size()?;
        ensure!(
            left == BALLOON,
            "the balloon has {left} in place of {BALLOON}"
        );
        guest.rmmod(setup.driver)
    })
}

fn no_swing_after_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().balloon(Some(ON)), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(BALLOON)?;
        let load = start_and_wait(guest)?;
        load.stop()?;

        // The memory is free again, and the host still wants it.
        let after = guest.balloon().size()?;
        let deflated = guest.vmstat("balloon_deflate")?;
        thread::sleep(Duration::from_secs(5));
        let later = guest.balloon().size()?;
        ensure!(
            later == after && guest.vmstat("balloon_deflate")? == deflated,
            "the balloon went from {after} to {later} right after the guest had been in need"
        );

        // After the pause it is taken, without another round of need.
        guest.balloon().settle(BALLOON)?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        guest.rmmod(setup.driver)
    })
}
