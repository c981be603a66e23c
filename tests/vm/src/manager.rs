// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `balloon-manager` with real guests. The host's tests cover its rules.

use anyhow::{Context, Result, ensure};
use vm::{Device, Guest, Load, Manager, Offer, Size};

use crate::scenario::{BOTH_DRIVERS, EXTENDED_DEVICE, PATIENCE, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "manager",
    proves: "the manager moves memory between a guest with the daemon's device and one with QEMU's own, over QMP, and \
        a balloon has a known target after the manager was killed",
    kernels: TEST_KERNEL,
    drivers: BOTH_DRIVERS,
    devices: EXTENDED_DEVICE,
    run: manager,
}];

/// The memory of each of the two guests, and that of both together.
const MEMORY: Size = Size::mib(1536);
const POOL: Size = Size::gib(2);

/// What a process uses: more than half of the pool.
const USED: Size = Size::mib(900);

fn manager(setup: &Setup) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let monitor = directory.path().join("db.qmp");
    let config = setup.config().memory(MEMORY).offer(&[Offer::DeflateOnOom]);
    let over_qmp = config
        .clone()
        .name_suffix("-qmp")
        .device(Device::Qemu)
        .argument(
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        );
    vm::run(&config, |web| {
        vm::run(&over_qmp, |db| {
            for guest in [web, db] {
                guest.insmod(setup.driver, setup.driver.low_floor())?;
            }
            let settings = format!(
                "profile = 'density'\nlease = 5\nqmp = '{}/*.qmp'\n[host]\npool = '{}MiB'\n[vm.'*']\nfloor = '256MiB'\n",
                directory.path().display(),
                POOL.as_mib()
            );
            let program = config.tool("balloon-manager");
            let manager = Manager::start(&program, &config.logs(), &[("web", web)], &settings)?;
            web.wait_until("the guests fit into the pool", PATIENCE, || {
                Ok(usable(web)? + usable(db)? <= POOL)
            })?;
            for (busy, idle, name) in [(web, db, "web"), (db, web, "db")] {
                let load = busy.load(Load::Hold {
                    mib: USED.as_mib().try_into()?,
                    threads: 1,
                })?;
                let (more, less) = (usable(busy)?, usable(idle)?);
                setup.note(format!(
                    "{name} uses {USED} of {more}, the other guest has {less}"
                ));
                ensure!(more >= USED, "the guest has {more}, and uses {USED}");
                load.verify(1)?;
                load.stop()?;
                // The other guest is next.
                let result = busy.wait_until("the guest gives memory back", PATIENCE, || {
                    Ok(usable(busy)? < USED)
                });
                result.with_context(|| manager.explain(name).unwrap_or_default())?;
            }
            let log = manager.log()?;
            ensure!(
                log.contains("db: sets its grant") && log.contains("web: sets its grant"),
                "the manager has set no target: {log}"
            );
            kill_manager(setup, manager, web)
        })
    })
}

/// The balloon has a known target after the manager was killed.
fn kill_manager(setup: &Setup, manager: Manager, web: &Guest) -> Result<()> {
    let daemon = web.daemon()?;
    let lease = daemon.info()?.lease.context("the target has no lease")?;
    // This kills it.
    drop(manager);
    web.wait_until("the lease ends", PATIENCE, || Ok(daemon.info()?.lapsed))?;
    let target = daemon.info()?.target;
    let size = Size::bytes(target);
    setup.note(format!("after the manager's end the target is {size}"));
    ensure!(
        target == lease.fallback,
        "the target is {size} and not {}",
        Size::bytes(lease.fallback)
    );
    Ok(())
}

/// The guest's memory without the balloon.
fn usable(guest: &Guest) -> Result<Size> {
    Ok(MEMORY.saturating_sub(guest.balloon().size()?))
}
