// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that runs out of memory gets it from the balloon, where the host allows it.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Guest, Load, Offer, RunningLoad, Size};

use crate::reporting::wait_until_taken;
use crate::{ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "deflate_on_oom",
        proves: "a process that needs more than is left lives, because the balloon deflates",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: deflate_on_oom,
    },
    Scenario {
        name: "oom_while_inflating",
        proves: "a process that needs what the balloon is about to take gets it and lives",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: oom_while_inflating,
    },
    Scenario {
        name: "no_deflate_on_oom",
        proves: "without the feature the balloon stays, and the process is killed",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: no_deflate_on_oom,
    },
    Scenario {
        name: "no_swing_after_oom",
        proves: "memory that was given back to a process in need is not taken again at once",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: no_swing_after_oom,
    },
];

/// What a guest has available before anything happens, of which the balloon takes three quarters
/// and a process needs half.
struct Shares {
    balloon: Size,
    need: usize,
}

impl Shares {
    fn of(guest: &Guest) -> Result<Self> {
        let available = guest.meminfo()?.available.as_mib();
        Ok(Self {
            balloon: Size::mib(available * 3 / 4),
            need: usize::try_from(available / 2)?,
        })
    }

    /// Starts a process that takes what it needs.
    fn start<'a>(&self, guest: &'a Guest) -> Result<RunningLoad<'a>> {
        guest.start_load(Load::Hog { mib: self.need })
    }

    /// Starts a process that takes what it needs, and waits until it has all of it.
    fn start_and_wait<'a>(&self, guest: &'a Guest) -> Result<RunningLoad<'a>> {
        let load = self.start(guest)?;
        self.wait(guest, &load)?;
        Ok(load)
    }

    /// Waits until a process has all that it needs.
    fn wait(&self, guest: &Guest, load: &RunningLoad<'_>) -> Result<()> {
        wait_until_taken(guest, load, self.need)
    }
}

/// How long a process may take to get its memory, or to be killed for it.
const PATIENCE: Duration = Duration::from_secs(120);

const ON: &[Offer] = &[Offer::DeflateOnOom];

/// The kernel's words when it looks for memory, and when it kills.
const OOM: &str = "invoked oom-killer|Out of memory";

fn deflate_on_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().offer(ON), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        let shares = Shares::of(guest)?;
        guest.balloon().settle(shares.balloon)?;
        let with_balloon = guest.meminfo()?.total;
        ensure!(
            with_balloon == total,
            "memory that can come back counts as the guest's: {with_balloon} of {total}"
        );

        let load = shares.start_and_wait(guest)?;
        let left = guest.balloon().size()?;
        ensure!(
            left < shares.balloon,
            "the balloon still has {left}, although the guest needed {} MiB",
            shares.need
        );
        setup.note(format!("{left} of {} left in the balloon", shares.balloon));
        load.stop()?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        guest.rmmod(setup.driver)
    })
}

fn oom_while_inflating(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().offer(ON), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        let start = Size::mib(shares.balloon.as_mib() / 2);
        let mut on_the_way = 0;
        for _ in 0..3 {
            guest.balloon().settle(start)?;
            let load = shares.start(guest)?;
            // So that both want the same memory.
            guest.wait_until("a process that has some memory", PATIENCE, || {
                Ok(load.status()?.progress.mib > 0)
            })?;
            guest.balloon().request(shares.balloon)?;
            let size = guest.balloon().size()?;
            on_the_way += usize::from(start <= size && size < shares.balloon);
            shares.wait(guest, &load)?;
            load.stop()?;
            // Which ends the pause after that, too.
            guest.balloon().settle(Size::default())?;
        }
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        ensure!(
            on_the_way > 0,
            "the balloon was there before the process was"
        );
        setup.note(format!(
            "the balloon was on its way {on_the_way} of 3 times"
        ));
        guest.rmmod(setup.driver)
    })
}

fn no_deflate_on_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().expect(OOM), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        guest.balloon().settle(shares.balloon)?;
        shares.start(guest)?.wait()?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(
            killed == 1,
            "{killed} processes were killed in place of one"
        );
        let left = guest.balloon().size()?;
        ensure!(
            left == shares.balloon,
            "the balloon has {left} in place of {}",
            shares.balloon
        );
        guest.rmmod(setup.driver)
    })
}

fn no_swing_after_oom(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().offer(ON), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        guest.balloon().settle(shares.balloon)?;
        let load = shares.start_and_wait(guest)?;
        load.stop()?;

        // The memory is free again, and the host still wants it. It says so once more, which is no other target.
        guest.balloon().request(shares.balloon)?;
        let after = guest.balloon().size()?;
        let deflated = guest.vmstat("balloon_deflate")?;
        thread::sleep(Duration::from_secs(5));
        let later = guest.balloon().size()?;
        ensure!(
            later == after && guest.vmstat("balloon_deflate")? == deflated,
            "the balloon went from {after} to {later} right after the guest had been in need"
        );

        // After the pause it is taken, without another round of need.
        guest.balloon().settle(shares.balloon)?;
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        guest.rmmod(setup.driver)
    })
}
