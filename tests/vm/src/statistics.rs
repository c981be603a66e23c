// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host sees the guest's own statistics.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use balloon_control::{Request, Stat, Stats};
use serde_json::Value;
use vm::{Guest, Load, Offer, Sample, Size};

use crate::debugfs::show;
use crate::lifecycle::device;
use crate::reporting::{self, FAST_REPORTS, check_reporting};
use crate::scenario::{
    ALL_ARCHITECTURES, ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, EXTENDED_DEVICE, OOM, PATIENCE,
    RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::{agree, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "statistics",
        proves: "the host sees the values of /proc/meminfo and /proc/vmstat, all of them",
        kernels: ALL_ARCHITECTURES,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: statistics,
    },
    Scenario {
        name: "statistics_while_stuck",
        proves: "statistics are sent while the balloon cannot inflate",
        kernels: BOTH_KERNELS,
        // The C driver inflates memory that the kernel itself needs: on a fast device the guest
        // panics.
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: statistics_while_stuck,
    },
    Scenario {
        name: "pressure_notices",
        proves: "a guest that reclaims memory sends statistics without a request",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: pressure_notices,
    },
    Scenario {
        name: "no_ballooning",
        proves: "inflate=0 keeps the balloon empty, and statistics and reports continue",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: no_ballooning,
    },
];

/// QEMU's value for a statistic that the guest has not sent.
const MISSING: u64 = u64::MAX;

/// Asks for a sample every second.
pub(crate) fn poll(guest: &Guest) -> Result<()> {
    guest.balloon().poll_statistics(1)
}

/// Waits for a sample that is newer than `than`, and was requested later.
pub(crate) fn newer(guest: &Guest, than: u64) -> Result<Sample> {
    let mut found = None;
    guest.wait_until("a new sample of statistics", PATIENCE, || {
        found = guest
            .balloon()
            .statistics()?
            .filter(|sample| sample.taken > than + 1);
        Ok(found.is_some())
    })?;
    found.context("it was there")
}

fn statistics(setup: &Setup) -> Result<()> {
    let size = Size::mib(300);
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        poll(guest)?;
        let sample = newer(guest, 0)?;
        let sent = sample.values().filter(|&(_, value)| value != MISSING);
        let sent = sent.count();
        ensure!(
            sent == Stat::ALL.len(),
            "the guest has sent {sent} of {} statistics",
            Stat::ALL.len()
        );

        let faults_before = sample.get("minor-faults")?;
        guest.balloon().settle(size)?;
        let load = guest.start_load(Load::Touch { mib: 64 })?;
        load.wait()?;
        let now = SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
        // The kernel may empty the per-CPU page lists in between, and with large pages they hold more.
        agree(guest, || check_memory(guest, &newer(guest, now)?))?;
        let sample = newer(guest, now)?;
        // Counters can only have grown in between.
        for (name, here) in [
            ("minor-faults", guest.vmstat("pgfault")?),
            ("major-faults", guest.vmstat("pgmajfault")?),
            ("oom-kills", guest.vmstat("oom_kill")?),
        ] {
            let there = sample.get(name)?;
            ensure!(
                there <= here && here - there <= 20_000,
                "{name} is {there}, and the guest says {here}"
            );
        }
        let faults = sample.get("minor-faults")?;
        ensure!(
            faults > faults_before,
            "{faults} faults, and {faults_before} before a process touched memory"
        );
        guest.rmmod(setup.driver)
    })
}

/// Checks that a new sample has the sizes that the guest says itself.
pub(crate) fn check_memory(guest: &Guest, sample: &Sample) -> Result<()> {
    // A load's memory stays on the per-CPU page lists for a while, where it does not count as free.
    const TOLERANCE: Size = Size::mib(64);
    let meminfo = guest.meminfo()?;
    for (name, here) in [
        ("total-memory", meminfo.total),
        ("free-memory", meminfo.free),
        ("available-memory", meminfo.available),
    ] {
        let there = Size::bytes(sample.get(name)?);
        ensure!(
            there.abs_diff(here) <= TOLERANCE,
            "{name} is {there}, and the guest says {here}"
        );
    }
    Ok(())
}

fn statistics_while_stuck(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        poll(guest)?;
        let mut sample = newer(guest, 0)?;
        guest
            .balloon()
            .request(guest.meminfo()?.total.saturating_sub(Size::mib(1)))?;
        for _ in 0..3 {
            sample = newer(guest, sample.taken)?;
        }
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

fn pressure_notices(setup: &Setup) -> Result<()> {
    const SIZE: Size = Size::mib(400);
    // The balloon shrinks for the process, which survives.
    let config = setup.config().offer(&[Offer::DeflateOnOom]).expect(OOM);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        guest.balloon().settle(SIZE)?;
        let daemon = guest.daemon()?;
        let sequence = |fresh| -> Result<u64> {
            let stats: Stats = daemon.call(&Request::Stats { fresh })?;
            Ok(stats.sequence)
        };
        // No client requests statistics from here on.
        daemon.call::<Value>(&Request::SetStatsInterval { seconds: 0 })?;
        let before = sequence(true)?;
        // More than the guest has.
        let mib = guest.meminfo()?.available.as_mib() + 100;
        let load = guest.start_load(Load::Hold {
            mib: mib.try_into()?,
            threads: 1,
        })?;
        guest.wait_until("statistics without a request", PATIENCE, || {
            Ok(sequence(false)? > before)
        })?;
        load.verify(1)?;
        let after = sequence(false)?;
        let notices = show(guest, "pressure_notices")?.trim().parse::<u64>()?;
        setup.note(format!(
            "{} statistics came without a request, and the guest counts {notices}",
            after - before
        ));
        ensure!(notices > 0, "the guest counts no notice");
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn no_ballooning(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .parameter(FAST_REPORTS)
        .offer(reporting::OFFER);
    vm::run(&config, |guest| {
        let total = guest.meminfo()?.total;
        let mark = guest.console().mark()?;
        guest.insmod(setup.driver, &["inflate=0"])?;
        poll(guest)?;
        let mut sample = newer(guest, 0)?;
        for size in [Size::mib(500), Size::mib(100), Size::mib(300)] {
            guest.balloon().request(size)?;
            sample = newer(guest, sample.taken)?;
            check_size(guest, Size::default())?;
        }
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        check_reporting(guest, Size::mib(300))?;
        let device = device(guest, setup.driver)?;
        let lines = guest
            .console()
            .count_since(mark, &format!("{device}: inflate=0"))?;
        ensure!(lines == 1, "the log gives the reason {lines} times");
        let balloon = show(guest, "balloon")?;
        ensure!(
            balloon.contains("stop_reason inflate=0"),
            "no reason for an empty balloon: {balloon}"
        );
        guest.rmmod(setup.driver)
    })
}
