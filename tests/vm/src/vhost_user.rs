// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user balloon device.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balloon_control::Shortfall;
use fastrand::Rng;
use serde_json::Value;
use vm::{Daemon, Guest, HugePages, Kernel, Load, MemoryBackend, Offer, Processes, Size};

use crate::overwriting::{go_on, stop};
use crate::scenario::{
    BOTH_DRIVERS, EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
    VHOST_USER_DEVICE,
};
use crate::sizes::check_size;

/// The kernel of the other scenarios, and the kernel of a system with systemd and the package's
/// unit.
const SERVICE_KERNELS: &[Kernel] = &[Kernel::Test, Kernel::Debian];

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "daemon_restart",
        proves: "a guest runs without its balloon's device, and with it after a restart",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: daemon_restart,
    },
    Scenario {
        name: "service_restart",
        proves: "no message is lost when the device's processes are restarted, updated and killed while the balloon changes its size",
        kernels: SERVICE_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: service_restart,
    },
    Scenario {
        name: "vmm_restart",
        proves: "the device serves one guest after the other, and each starts with an empty balloon",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: vmm_restart,
    },
    Scenario {
        name: "client",
        proves: "balloonctl works as documented, and its exit codes match the errors",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: client,
    },
    Scenario {
        name: "stop_reasons",
        proves: "the driver reports to the host why the balloon is below its target",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: stop_reasons,
    },
    Scenario {
        name: "hugetlb_memory",
        proves: "the host gets a huge page when all of it is in the balloon",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: hugetlb_memory,
    },
];

fn daemon_restart(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        let daemon = guest.daemon()?;
        guest.balloon().settle(Size::mib(300))?;
        // A killed worker cannot clean up.
        for (kill, size) in [(true, Size::mib(400)), (false, Size::mib(100))] {
            let before = guest.balloon().size()?;
            let total = guest.meminfo()?.total;
            let processes = daemon.processes()?;
            if kill {
                daemon.kill_worker()?;
            } else {
                daemon.replace_processes()?;
            }
            wait_restarted(guest, processes)?;
            let after = guest.balloon().size()?;
            ensure!(
                after == before,
                "the balloon is {after} after a restart of the device, and was {before}"
            );
            thread::sleep(Duration::from_millis(500));
            let now = guest.meminfo()?.total;
            ensure!(
                now == total,
                "the guest had {total}, and has {now} without a request"
            );
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        kill_while_stopped(guest, &daemon)?;
        guest.rmmod(setup.driver)
    })
}

/// Kills the worker while the VM is stopped. QEMU has stopped the queues then. The balloon must be the same when the VM
/// continues.
fn kill_while_stopped(guest: &Guest, daemon: &Daemon) -> Result<()> {
    let (before, deflated) = (guest.balloon().size()?, guest.vmstat("balloon_deflate")?);
    let processes = daemon.processes()?;
    stop(guest)?;
    daemon.kill_worker()?;
    wait_other_processes(guest, processes)?;
    go_on(guest)?;
    wait_driver(guest)?;
    thread::sleep(Duration::from_millis(500));
    let (size, now) = (guest.balloon().size()?, guest.vmstat("balloon_deflate")?);
    ensure!(
        (size, now) == (before, deflated),
        "the balloon was {before} when the VM was stopped, and is {size}; {} pages were deflated",
        now - deflated
    );
    Ok(())
}

/// Waits until the guest's driver uses the device.
pub(crate) fn wait_driver(guest: &Guest) -> Result<()> {
    guest.wait_until("the device has a driver", PATIENCE, || {
        // The driver may not have started yet.
        Ok(guest.daemon()?.info().is_ok_and(|info| info.guest.driver))
    })
}

/// A way to end processes of the daemon: its name, and the function.
type NamedRestart = (&'static str, fn(&Daemon) -> Result<()>);

const RESTARTS: [NamedRestart; 4] = [
    ("restarted", Daemon::restart),
    ("killed", Daemon::kill_and_restart),
    ("updated", Daemon::replace_processes),
    ("without its worker", Daemon::kill_worker),
];

fn service_restart(setup: &Setup) -> Result<()> {
    const ROUNDS: usize = 20;
    // It respects the driver's default reserve.
    const LARGEST: u64 = 500;
    let config = setup.config();
    let daemon = Arc::new(config.start_daemon_service()?);
    vm::run(&config.daemon(&daemon), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(Size::mib(300))?;
        let load = guest.load(Load::Hold {
            mib: 96,
            threads: 1,
        })?;
        let mut rng = Rng::with_seed(0);
        for (round, (name, restart)) in (0..ROUNDS).zip(RESTARTS.iter().cycle()) {
            let what = || format!("round {round}: {name}");
            let before = daemon.processes()?;
            // The balloon changes its size.
            let size = Size::mib(rng.u64(..LARGEST));
            guest.balloon().request(size).with_context(what)?;
            thread::sleep(Duration::from_millis(rng.u64(..500)));
            restart(&daemon)
                .and_then(|()| wait_restarted(guest, before))
                .with_context(what)?;
        }
        load.verify(1)?;
        load.stop()?;

        // A new worker counts deflated and inflated memory from 0. If both counts match, the device and the
        // guest agree on the pages of the balloon.
        let size = Size::mib(LARGEST);
        guest.balloon().settle(size)?;
        check_size(guest, size)?;
        let before = daemon.processes()?;
        daemon.kill_worker()?;
        wait_restarted(guest, before)?;
        guest.balloon().settle(Size::default())?;
        check_size(guest, Size::default())?;
        guest.balloon().settle(size)?;
        check_size(guest, size)?;
        let counters = daemon.info()?.counters;
        let (deflated, inflated) = (counters.deflated, counters.inflated);
        ensure!(
            deflated == size.as_bytes() && inflated == size.as_bytes(),
            "{size} were deflated and inflated, and the device counts {deflated} and {inflated} bytes"
        );
        ensure!(
            counters.refused.is_empty(),
            "refused: {:?}",
            counters.refused
        );
        setup.note(format!(
            "{ROUNDS} restarts, and guest and device agree on {} pages",
            size.as_pages()
        ));
        guest.rmmod(setup.driver)
    })?;
    daemon.end()
}

/// Waits until new processes replace these, and the guest's driver uses the device.
pub(crate) fn wait_restarted(guest: &Guest, before: Processes) -> Result<()> {
    wait_other_processes(guest, before)?;
    wait_driver(guest)
}

fn wait_other_processes(guest: &Guest, before: Processes) -> Result<()> {
    guest.wait_until("other processes of the daemon", PATIENCE, || {
        Ok(guest.daemon()?.processes().is_ok_and(|now| now != before))
    })
}

fn vmm_restart(setup: &Setup) -> Result<()> {
    let config = setup.config();
    let daemon = Arc::new(config.start_daemon()?);
    for round in 0..2 {
        vm::run(&config.clone().daemon(&daemon), |guest| {
            // The target stays.
            let target = Size::bytes(daemon.info()?.target);
            ensure!(
                target == Size::mib(round * 200),
                "the target of another guest is {target}"
            );
            guest.insmod(setup.driver, &[])?;
            guest.balloon().reach(target)?;
            guest.balloon().settle(Size::mib(200))?;
            check_size(guest, Size::mib(200))
        })?;
        let info = daemon.info()?;
        ensure!(
            !info.guest.connected && info.memory.is_none(),
            "the device still has the state of a guest that has ended: {info:?}"
        );
    }
    daemon.end()
}

/// Runs balloonctl and checks its exit code. Returns what it wrote.
pub(crate) fn balloonctl(
    setup: &Setup,
    socket: &Path,
    arguments: &[&str],
    exit: i32,
) -> Result<String> {
    let output = Command::new(setup.tool("balloonctl"))
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .output()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(
        output.status.code() == Some(exit),
        "balloonctl {} ends with {}, not {exit}: {text}",
        arguments.join(" "),
        output.status
    );
    Ok(text)
}

fn client(setup: &Setup) -> Result<()> {
    let config = setup.config();
    let socket = vm::run(&config, |guest| {
        let socket = guest.daemon()?.control();
        let run = |arguments: &[&str], exit| balloonctl(setup, &socket, arguments, exit);
        // No driver yet.
        run(&["set", "100M", "--wait"], 4)?;
        run(&["stats", "--fresh"], 4)?;
        let total = guest.meminfo()?.total;
        guest.insmod(setup.driver, &[])?;
        guest.balloon().reach(Size::mib(100))?;
        run(&["set", "2G"], 5)?;
        run(&["set", "many"], 2)?;
        // A part of the guest's memory, which is less than the VM's memory.
        run(&["set", "25%", "--wait"], 0)?;
        check_size(guest, Size::bytes(total.as_bytes() / 4 / 4096 * 4096))?;
        run(&["set", "256M", "--wait"], 0)?;
        check_size(guest, Size::mib(256))?;
        let info: Value = serde_json::from_str(&run(&["--json", "info"], 0)?)?;
        ensure!(
            info["size"] == Size::mib(256).as_bytes(),
            "balloonctl info says {info}"
        );
        let stats: Value = serde_json::from_str(&run(&["--json", "stats", "--fresh"], 0)?)?;
        let said = Size::bytes(
            stats["values"]["total-memory"]
                .as_u64()
                .context("a total")?,
        );
        let here = guest.meminfo()?.total;
        ensure!(said == here, "the guest has {here}, and reports {said}");
        let metrics = run(&["metrics"], 0)?;
        ensure!(
            metrics.contains("268435456"),
            "the balloon's size is not in:\n{metrics}"
        );
        run(&["set", "300M", "--expect", "100M"], 7)?;
        run(&["set", "300M", "--expect", "256M", "--lease", "1"], 0)?;
        guest.wait_until("the lease ends", PATIENCE, || {
            Ok(guest.daemon()?.info()?.lapsed)
        })?;
        guest.balloon().reach(Size::mib(256))?;
        // More than the guest can inflate.
        let most = format!("{}M", (total - Size::mib(16)).as_mib());
        run(&["set", &most, "--wait", "--timeout", "2"], 6)?;
        run(&["set", "0", "--wait"], 0)?;
        guest.rmmod(setup.driver)?;
        Ok(socket)
    })?;
    // The daemon has ended with its guest.
    balloonctl(setup, &socket, &["info"], 3)?;
    Ok(())
}

fn stop_reasons(setup: &Setup) -> Result<()> {
    let config = setup.config().offer(&[Offer::DeflateOnOom]);
    vm::run(&config, |guest| {
        let expect = |reason: Option<Shortfall>| {
            let mut last = None;
            guest
                .wait_until("a reason", PATIENCE, || {
                    last = guest.daemon()?.info()?.guest.short_of_target;
                    Ok(last == reason)
                })
                .with_context(|| format!("the reason is {last:?}, not {reason:?}"))
        };
        guest.insmod(setup.driver, &["floor_mib=200"])?;
        guest.balloon().request(Size::mib(900))?;
        expect(Some(Shortfall::Floor))?;
        guest.balloon().settle(Size::mib(100))?;
        expect(None)?;
        guest.rmmod(setup.driver)?;

        guest.insmod(setup.driver, &["inflate=0"])?;
        expect(Some(Shortfall::Excluded))?;
        guest.rmmod(setup.driver)
    })
}

fn hugetlb_memory(setup: &Setup) -> Result<()> {
    let (memory, size) = (Size::gib(1), Size::mib(512));
    let pages = HugePages::reserve(memory)?;
    // Neither driver sends a huge page in one message.
    let config = setup
        .config()
        .backend(MemoryBackend::Hugetlb)
        .daemon_argument("--granule=2M")
        .daemon_argument("--allow=hugetlb");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        // The host gets back only memory that the guest has used.
        guest.touch(Size::mib(700))?;
        let before = pages.free()?;
        guest.balloon().settle(size)?;
        let data = guest.load(Load::Hold {
            mib: 128,
            threads: 2,
        })?;
        let full = pages.free()?;
        guest.balloon().settle(Size::default())?;
        guest.balloon().settle(size)?;
        data.verify(2)?;
        data.stop()?;
        setup.note(format!(
            "the host had {before} in free huge pages, and {full} with {size} in the balloon"
        ));
        ensure!(
            full > before + Size::mib(300),
            "the host had {before} in free huge pages, and has {full} with {size} in the balloon"
        );
        guest.rmmod(setup.driver)
    })
}
