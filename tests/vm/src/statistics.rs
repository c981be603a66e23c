// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The statistics that the host sees are the guest's own.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::json;
use vm::{Guest, Load, Size};

use crate::lifecycle::device;
use crate::reporting::{self, FAST_REPORTS, check_reporting};
use crate::sizes::check_size;
use crate::{BOTH_DRIVERS, BOTH_KERNELS, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "statistics",
        proves: "the host sees what /proc/meminfo and /proc/vmstat say, all sixteen kinds of it",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        run: statistics,
    },
    Scenario {
        name: "statistics_while_stuck",
        proves: "statistics go on while the balloon cannot grow",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        run: statistics_while_stuck,
    },
    Scenario {
        name: "no_ballooning",
        proves: "inflate=0 keeps the balloon empty, while statistics and reports go on",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        run: no_ballooning,
    },
];

/// What QEMU shows for a kind that the guest has not sent.
const MISSING: u64 = u64::MAX;

/// How long a sample may take, at an interval of one second.
const PATIENCE: Duration = Duration::from_secs(20);

/// QEMU's view of the statistics.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Sample {
    stats: HashMap<String, u64>,
    /// Seconds since 1970; 0 before the first sample.
    last_update: u64,
}

impl Sample {
    fn take(guest: &Guest) -> Result<Self> {
        guest.qmp().execute(
            "qom-get",
            &json!({"path": "/machine/peripheral/balloon0", "property": "guest-stats"}),
        )
    }

    fn get(&self, name: &str) -> Result<u64> {
        self.stats
            .get(name)
            .copied()
            .with_context(|| format!("QEMU knows no {name}"))
    }

    fn size(&self, name: &str) -> Result<Size> {
        Ok(Size::bytes(self.get(name)?))
    }
}

/// Asks for a sample every second.
pub(crate) fn poll(guest: &Guest) -> Result<()> {
    guest.qmp().execute::<serde_json::Value>(
        "qom-set",
        &json!({
            "path": "/machine/peripheral/balloon0",
            "property": "guest-stats-polling-interval",
            "value": 1,
        }),
    )?;
    Ok(())
}

/// Waits for a sample that is newer than `than`, and was not under way already.
pub(crate) fn newer(guest: &Guest, than: u64) -> Result<Sample> {
    guest.wait_until("a new sample of statistics", PATIENCE, || {
        Ok(Sample::take(guest)?.last_update > than + 1)
    })?;
    Sample::take(guest)
}

fn statistics(setup: &Setup) -> Result<()> {
    let (size, tolerance) = (Size::mib(300), Size::mib(24));
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        poll(guest)?;
        let sample = newer(guest, 0)?;
        for (name, &value) in &sample.stats {
            ensure!(value != MISSING, "the guest has sent no {name}");
        }

        let faults_before = sample.get("stat-minor-faults")?;
        guest.balloon().settle(size)?;
        let load = guest.load(Load::Touch { mib: 64 })?;
        load.wait(Duration::from_secs(60))?;
        let sample = newer(guest, sample.last_update)?;
        let meminfo = guest.meminfo()?;
        for (name, here) in [
            ("stat-total-memory", meminfo.total),
            ("stat-free-memory", meminfo.free),
            ("stat-available-memory", meminfo.available),
        ] {
            let there = sample.size(name)?;
            ensure!(
                there.abs_diff(here) <= tolerance,
                "{name} is {there}, and the guest says {here}"
            );
        }
        // Counters can only have grown in between.
        for (name, here) in [
            ("stat-minor-faults", guest.vmstat("pgfault")?),
            ("stat-major-faults", guest.vmstat("pgmajfault")?),
            ("stat-oom-kills", guest.vmstat("oom_kill")?),
        ] {
            let there = sample.get(name)?;
            ensure!(
                there <= here && here - there <= 20_000,
                "{name} is {there}, and the guest says {here}"
            );
        }
        let faults = sample.get("stat-minor-faults")?;
        ensure!(
            faults > faults_before,
            "{faults} faults, and {faults_before} before a process touched memory"
        );
        guest.rmmod(setup.driver)
    })
}

fn statistics_while_stuck(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        poll(guest)?;
        let mut sample = newer(guest, 0)?;
        guest
            .balloon()
            .request(guest.memory().saturating_sub(Size::mib(1)))?;
        for _ in 0..3 {
            sample = newer(guest, sample.last_update)?;
        }
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

fn no_ballooning(setup: &Setup) -> Result<()> {
    let config = setup
        .config()
        .parameter(FAST_REPORTS)
        .balloon(Some(reporting::DEVICE));
    vm::run(&config, |guest| {
        let total = guest.meminfo()?.total;
        let mark = guest.console().mark()?;
        guest.insmod(setup.driver, &["inflate=0"])?;
        poll(guest)?;
        let mut sample = newer(guest, 0)?;
        for size in [Size::mib(500), Size::mib(100), Size::mib(300)] {
            guest.balloon().request(size)?;
            sample = newer(guest, sample.last_update)?;
            check_size(guest, Size::default())?;
        }
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
        check_reporting(guest, Size::mib(300))?;
        let device = device(guest, setup.driver)?;
        let lines = guest
            .console()
            .count_since(mark, &format!(r"{device}: .*\binflate\b"))?;
        ensure!(lines == 1, "the log says {lines} times why nothing happens");
        guest.rmmod(setup.driver)
    })
}
