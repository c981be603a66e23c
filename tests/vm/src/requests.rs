// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's answers to the host's requests and commands for hints.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balloon_control::{HintAction, Request};
use serde_json::Value;
use vm::{Daemon, Guest, Load, Offer, Size};

use crate::scenario::{
    BOTH_DRIVERS, CALLBACK_KERNELS, EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup,
    TEST_KERNEL, VHOST_USER_DEVICE,
};
use crate::vhost_user::{balloonctl, wait_driver, wait_restarted};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "host_requests",
        proves: "the guest answers the host's requests, while its data stay intact, and after a restart of the device",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: host_requests,
    },
    Scenario {
        name: "hints",
        proves: "the host gets hints without a migration, too, and the guest gets its memory back",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: hints,
    },
    Scenario {
        name: "hints_leave_floor",
        proves: "hints leave floor_mib of available memory to the guest",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: VHOST_USER_DEVICE,
        run: hints_leave_floor,
    },
];

/// Runs balloonctl, and returns its answer as JSON.
fn answer(setup: &Setup, guest: &Guest, arguments: &[&str]) -> Result<Value> {
    let arguments = [&["--json"], arguments].concat();
    let text = balloonctl(setup, &guest.daemon()?.control(), &arguments, 0)?;
    Ok(serde_json::from_str(&text)?)
}

fn amount(answer: &Value, what: &str) -> Result<Size> {
    Ok(Size::bytes(answer[what].as_u64().context("an amount")?))
}

/// Checks the memory that the guest lists as unused, which is written to `file`.
fn check_unused(setup: &Setup, guest: &Guest, file: &Path) -> Result<()> {
    let out = file.to_str().context("a path that is text")?;
    let free = guest.free()?;
    let unused = answer(setup, guest, &["unused", "--out", out])?;
    let named = amount(&unused, "named")?;
    ensure!(
        named + Size::mib(64) > free && named < free + Size::mib(64),
        "{named} are unused, and {free} are free"
    );
    let bitmap = fs::read(file)?;
    let pages: u32 = bitmap.iter().skip(64).map(|byte| byte.count_ones()).sum();
    ensure!(
        Size::bytes(u64::from(pages) * 4096) == named,
        "{named} are unused, and {pages} pages in the file"
    );
    Ok(())
}

/// Checks the memory that the guest returns to the host.
fn check_reclaim(setup: &Setup, guest: &Guest) -> Result<()> {
    let (free, before) = (guest.free()?, guest.resident()?);
    let answer = answer(setup, guest, &["reclaim"])?;
    let (named, discarded) = (amount(&answer, "named")?, amount(&answer, "discarded")?);
    ensure!(
        named > Size::mib(100) && discarded == named,
        "{free} are free, {named} were listed and {discarded} returned"
    );
    let now = guest.resident()?;
    setup.note(format!(
        "{discarded} of {free} free memory were returned, and {before} became {now}"
    ));
    Ok(())
}

fn host_requests(setup: &Setup) -> Result<()> {
    type Restart = fn(&Daemon) -> Result<()>;
    const RESTARTS: [Option<Restart>; 3] = [
        None,
        Some(Daemon::replace_processes),
        Some(Daemon::kill_worker),
    ];
    let file = setup.logs().join("unused-pages");
    vm::run(&setup.config(), |guest| {
        let daemon = guest.daemon()?;
        let run = |arguments: &[&str], exit| balloonctl(setup, &daemon.control(), arguments, exit);
        run(&["reclaim"], 4)?;
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        // The host gets back only memory that the guest has used.
        guest.touch(Size::mib(500))?;
        let data = guest.load(Load::Hold {
            mib: 200,
            threads: 2,
        })?;
        for restart in RESTARTS {
            if let Some(restart) = restart {
                let processes = daemon.processes()?;
                restart(&daemon)?;
                wait_restarted(guest, processes)?;
            }
            check_unused(setup, guest, &file)?;
            check_reclaim(setup, guest)?;
            run(&["drop-caches"], 0)?;
            run(&["drop-caches", "--slab"], 0)?;
            data.verify(1)?;
        }
        data.stop()?;
        let refused = daemon.info()?.counters.refused;
        ensure!(refused.is_empty(), "refused: {refused:?}");
        guest.rmmod(setup.driver)?;
        let out = file.to_str().context("a path that is text")?;
        run(&["unused", "--out", out], 4)?;
        Ok(())
    })
}

/// Starts or ends hints.
pub(crate) fn hint(guest: &Guest, action: HintAction) -> Result<()> {
    guest.daemon()?.call::<Value>(&Request::Hints { action })?;
    Ok(())
}

fn hints(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().offer(&[Offer::FreePageHint]), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        wait_driver(guest)?;
        let free = guest.free()?;
        for _ in 0..2 {
            let before = guest.daemon()?.info()?.counters.hinted;
            hint(guest, HintAction::Start)?;
            guest.wait_until("hints for all free memory", PATIENCE, || {
                let hinted = guest.daemon()?.info()?.counters.hinted - before;
                Ok(Size::bytes(hinted) + Size::mib(150) > free)
            })?;
            let now = guest.free()?;
            ensure!(
                now < Size::mib(150),
                "{now} of {free} are free in a guest that has hinted everything"
            );
            hint(guest, HintAction::Stop)?;
            hint(guest, HintAction::Done)?;
            guest.wait_until("all memory is free again", PATIENCE, || {
                Ok(guest.free()? + Size::mib(32) > free)
            })?;
        }
        guest.rmmod(setup.driver)
    })
}

fn hints_leave_floor(setup: &Setup) -> Result<()> {
    let floor = Size::mib(400);
    vm::run(&setup.config().offer(&[Offer::FreePageHint]), |guest| {
        guest.insmod(setup.driver, &[&format!("floor_mib={}", floor.as_mib())])?;
        wait_driver(guest)?;
        let free = guest.free()?;
        hint(guest, HintAction::Start)?;
        let available = || -> Result<Size> { Ok(guest.meminfo()?.available) };
        guest.wait_until("hints for all but the floor", PATIENCE, || {
            Ok(available()? < floor + Size::mib(32))
        })?;
        // More than the memory that the driver may not hint.
        thread::sleep(Duration::from_secs(1));
        let left = available()?;
        ensure!(
            left + Size::mib(16) > floor,
            "hints have left {left} of {free}, not {floor}"
        );
        hint(guest, HintAction::Done)?;
        guest.wait_until("all memory is free again", PATIENCE, || {
            Ok(guest.free()? + Size::mib(32) > free)
        })?;
        guest.rmmod(setup.driver)
    })
}
