// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page reporting: the host gets the guest's free memory without a request.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vm::{Driver, Guest, Load, Offer, RunningLoad, Size};

use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, CALLBACK_KERNELS, PATIENCE, Scenario, Setup, TEST_KERNEL,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "free_page_reporting",
        proves: "the host gets 6 GiB back that processes and files have used and freed",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: free_page_reporting,
    },
    Scenario {
        name: "reporting_and_ballooning",
        proves: "the guest's data stay intact while pages are reported and ballooned",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: reporting_and_ballooning,
    },
];

/// A device with free page reporting.
pub(crate) const OFFER: &[Offer] = &[Offer::FreePageReporting];

/// A kernel parameter that makes the kernel report twenty times as often as by default.
pub(crate) const FAST_REPORTS: &str = "page_reporting.page_reporting_delay_ms=100";

/// How much of the freed memory the host may miss: a twentieth and, in small guests, as much as may
/// be in blocks that are too small for a report.
fn tolerance(used: Size) -> Size {
    Size::bytes(used.as_bytes() / 20).max(Size::mib(64))
}

/// The memory that a guest has used and returned, as the host sees it.
pub(crate) struct Returned {
    /// QEMU's memory at its peak, and afterwards.
    peak: Size,
    left: Size,
}

impl Returned {
    fn size(&self) -> Size {
        self.peak.saturating_sub(self.left)
    }
}

/// Runs a process that uses memory, and checks that the host gets back what the process has
/// written.
pub(crate) fn check_reporting(guest: &Guest, used: Size) -> Result<Returned> {
    let idle = at_rest(guest)?;
    let load = take(guest, used)?;
    let peak = guest.resident()?;
    load.stop()?;
    check_returned(guest, used, idle, peak, || Ok(()))
}

/// Waits until the host has the memory that the guest used, and calls a function repeatedly
/// meanwhile.
fn check_returned(
    guest: &Guest,
    used: Size,
    idle: Size,
    peak: Size,
    mut meanwhile: impl FnMut() -> Result<()>,
) -> Result<Returned> {
    // Some of the memory that the guest uses was resident before: what earlier checks have tolerated, too.
    let grown = Size::bytes(used.as_bytes() / 2).max(tolerance(used));
    ensure!(
        peak.saturating_sub(idle) >= grown,
        "QEMU has {peak} after the guest has used {used}, and had {idle} before"
    );
    let came_back = guest.wait_until("the host gets the free memory", PATIENCE, || {
        meanwhile()?;
        Ok(guest.resident()? <= idle + tolerance(used))
    });
    let left = guest.resident()?;
    came_back.with_context(|| format!("QEMU had {idle}, then {peak}, and has {left}"))?;
    Ok(Returned { peak, left })
}

/// Starts a process that uses memory, and waits until it has all of it.
pub(crate) fn take(guest: &Guest, size: Size) -> Result<RunningLoad<'_>> {
    let mib = usize::try_from(size.as_mib())?;
    let load = guest.start_load(Load::Hog { mib })?;
    wait_until_taken(guest, &load, mib)?;
    Ok(load)
}

/// Waits until a process that allocates `mib` MiB has all of them.
pub(crate) fn wait_until_taken(guest: &Guest, load: &RunningLoad<'_>, mib: usize) -> Result<()> {
    guest.wait_until("a process has its memory", PATIENCE, || {
        let status = load.status()?;
        ensure!(
            status.exit.is_none(),
            "it ended with {:?} at {} MiB",
            status.exit,
            status.progress.mib
        );
        Ok(status.progress.mib >= mib)
    })
}

/// Waits until QEMU's memory stops shrinking, and returns its size.
pub(crate) fn at_rest(guest: &Guest) -> Result<Size> {
    const QUIET: Duration = Duration::from_secs(1);
    let (mut least, mut since) = (guest.resident()?, Instant::now());
    while since.elapsed() < QUIET {
        guest.check_alive()?;
        thread::sleep(Duration::from_millis(50));
        let now = guest.resident()?;
        if now + Size::mib(1) < least {
            (least, since) = (now, Instant::now());
        }
    }
    guest.resident()
}

/// The memory that the driver has reported. The C driver does not count it.
pub(crate) fn reported(setup: &Setup, guest: &Guest) -> Result<Option<Size>> {
    match setup.driver {
        Driver::C => Ok(None),
        Driver::Rust | Driver::Lying => {
            let bytes = guest.sh("cat /sys/kernel/debug/virtio_balloon_rs-*/reported_bytes")?;
            Ok(Some(Size::bytes(bytes.trim().parse()?)))
        }
    }
}

fn free_page_reporting(setup: &Setup) -> Result<()> {
    let half = Size::gib(3);
    let config = setup
        .config()
        .memory(Size::gib(8))
        .parameter(FAST_REPORTS)
        .offer(OFFER);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        let idle = at_rest(guest)?;
        let reported_before = reported(setup, guest)?;

        let load = take(guest, half)?;
        let fill = format!("dd if=/dev/zero of=/tmp/file bs=1M count={}", half.as_mib());
        let pending = guest.start(&["sh", "-c", &fill], None)?;
        guest.output(&pending, PATIENCE)?;
        let peak = guest.resident()?;
        let start = Instant::now();
        guest.sh("rm /tmp/file")?;
        load.stop()?;
        let returned = check_returned(guest, half + half, idle, peak, || Ok(()))?;
        let took = start.elapsed();

        let (left, size) = (returned.left, returned.size());
        if let (Some(before), Some(now)) = (reported_before, reported(setup, guest)?) {
            ensure!(
                now.saturating_sub(before) >= size,
                "the host got {size}, and the driver has reported {now} in all, {before} of it before"
            );
        }
        let rest = at_rest(guest)?;
        setup.note(format!(
            "QEMU had {idle}, then {peak}, {left} after {took:.1?}, and {rest} at rest"
        ));
        guest.rmmod(setup.driver)
    })
}

fn reporting_and_ballooning(setup: &Setup) -> Result<()> {
    let used = Size::mib(500);
    // So rarely that the balloon inflates and deflates several times until everything is reported.
    let seldom = setup.by_speed(
        "page_reporting.page_reporting_delay_ms=500",
        "page_reporting.page_reporting_delay_ms=3000",
    );
    let config = setup.config().parameter(seldom).offer(OFFER);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        let data = guest.load(Load::Hold {
            mib: 128,
            threads: 2,
        })?;
        let reported_before = reported(setup, guest)?;
        let (mut rounds, mut cycles) = (0, 0);
        while rounds < 3 || cycles < 6 {
            rounds += 1;
            let idle = at_rest(guest)?;
            let load = take(guest, used)?;
            let peak = guest.resident()?;
            load.stop()?;
            // The balloon changes its size until everything is reported.
            check_returned(guest, used, idle, peak, || {
                cycles += 1;
                guest.balloon().settle(Size::mib(100))?;
                guest.balloon().settle(Size::mib(20))?;
                Ok(())
            })?;
        }
        let passes = data.status()?.progress.passes;
        ensure!(passes >= 3, "the data were verified {passes} times only");
        data.stop()?;
        if let (Some(before), Some(now)) = (reported_before, reported(setup, guest)?) {
            ensure!(
                now.saturating_sub(before) >= used,
                "the driver has reported {now} in all, {before} of it before {used} were used"
            );
        }
        setup.note(format!(
            "the balloon was inflated {cycles} times in {rounds} rounds, the data were verified {passes} times"
        ));
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}
