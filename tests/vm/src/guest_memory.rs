// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's estimate of the guest's memory, and the daemon's floor.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm::{Daemon, Driver, Guest, Size};

use crate::scenario::{BOTH_DRIVERS, PATIENCE, Scenario, Setup, TEST_KERNEL, VHOST_USER_DEVICE};
use crate::sizes::check_size;
use crate::vhost_user::{balloonctl, wait_driver};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "guest_memory",
        proves: "percentages refer to the guest's memory: without NVDIMM, ivshmem, and memory that virtio-mem has not plugged",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: guest_memory,
    },
    Scenario {
        name: "kept_target",
        proves: "with the kept target of a larger VM, the daemon lets a smaller VM boot first, and then respects its floor",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: kept_target,
    },
];

/// For how long the size of a balloon that cannot grow stays the same.
const QUIET: Duration = Duration::from_secs(3);

/// The guest's memory, the balloon's included.
fn memory(guest: &Guest) -> Result<Size> {
    let memory = guest.meminfo()?;
    Ok(memory.total + memory.balloon)
}

/// The largest balloon that leaves the floor of the default `--floor auto`.
fn limit(memory: Size) -> Size {
    let floor = Size::mib(64) + Size::bytes(memory.as_bytes() / 16);
    Size::pages((memory - floor).as_pages())
}

/// Waits until the daemon knows the guest's memory. While the balloon changes its size, pages in flight are in neither
/// of the guest's two numbers, or in both.
fn wait_known(guest: &Guest, daemon: &Daemon) -> Result<Size> {
    let mut last = Size::default();
    guest.wait_until("a daemon that knows the guest's memory", PATIENCE, || {
        last = memory(guest)?;
        let info = daemon.info()?;
        let limit = limit(last).as_bytes();
        Ok(info.memory == Some(last.as_bytes()) && info.limit == Some(limit))
    })?;
    Ok(last)
}

fn guest_memory(setup: &Setup) -> Result<()> {
    let (more, plugged) = (Size::gib(8), Size::gib(1));
    let config = setup
        .config()
        .virtio_mem_with_balloon(more, "online_movable")
        .argument("-m", "slots=1,maxmem=10G")
        .argument("-machine", "nvdimm=on")
        .argument("-object", "memory-backend-memfd,id=nv,size=256M,share=on")
        .extra_device("nvdimm,id=nv0,memdev=nv")
        .argument("-object", "memory-backend-memfd,id=iv,size=64M,share=on")
        .extra_device("ivshmem-plain,memdev=iv")
        .daemon_argument("--floor=auto");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        let daemon = guest.daemon()?;
        let socket = daemon.control();
        let run = |arguments: &[&str], exit| balloonctl(setup, &socket, arguments, exit);
        let at_first = wait_known(guest, &daemon)?;
        let shared = daemon.info()?.shared.context("no memory is shared")?;
        ensure!(
            shared >= (guest.memory() + more + Size::mib(256 + 64)).as_bytes(),
            "QEMU has shared {shared} bytes only"
        );
        run(&["set", "2G"], 5)?;
        run(&["set", "50%", "--wait"], 0)?;
        check_size(guest, Size::pages((at_first.as_bytes() / 2) >> 12))?;
        run(&["stats", "--fresh"], 0)?;
        ensure!(wait_known(guest, &daemon)? == at_first);

        // This driver stops at its own reserve, which is larger.
        let most = limit(at_first);
        guest.balloon().request(most)?;
        let size = guest.balloon().rest(QUIET)?;
        ensure!(setup.driver == Driver::C || size < most);
        guest.plug(plugged)?;
        let now = wait_known(guest, &daemon)?;
        ensure!(now == at_first + plugged, "{at_first} became {now}");
        guest.balloon().reach(most)?;
        let most = limit(now) - Size::mib(300);
        guest.balloon().settle(most)?;
        setup.note(format!(
            "{at_first} of {} shared, then {now}, of which {most} were in the balloon",
            Size::bytes(shared)
        ));

        guest.balloon().settle(Size::default())?;
        guest.plug(Size::default())?;
        let now = wait_known(guest, &daemon)?;
        ensure!(now == at_first, "{at_first} became {now}");
        guest.rmmod(setup.driver)
    })
}

fn kept_target(setup: &Setup) -> Result<()> {
    /// The default of `--boot-grace`, in seconds.
    const GRACE: u64 = 30;
    let target = Size::mib(1500);
    let config = setup.config().daemon_defaults();
    let daemon = Arc::new(config.start_daemon()?);
    let config = config.daemon(&daemon);
    vm::run(&config.clone().memory(Size::gib(2)), |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        // The daemon passes on a new target at once.
        guest.balloon().settle(target)?;
        check_size(guest, target)
    })?;
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        let grace = daemon.info()?.grace;
        ensure!(
            grace.is_some_and(|seconds| (GRACE / 2..=GRACE).contains(&seconds)),
            "the daemon waits {grace:?} s for the guest to boot"
        );
        while daemon.info()?.grace.is_some() {
            let balloon = guest.meminfo()?.balloon;
            // The wait may have ended meanwhile.
            ensure!(
                balloon == Size::default() || daemon.info()?.grace.is_none(),
                "{balloon} are in the balloon of a guest that boots"
            );
            thread::sleep(Duration::from_millis(200));
        }
        guest.wait_until("a balloon that grows", PATIENCE, || {
            Ok(guest.balloon().size()? > Size::default())
        })?;
        let size = guest.balloon().rest(QUIET)?;
        let memory = wait_known(guest, &daemon)?;
        let left = guest.meminfo()?;
        setup.note(format!(
            "{size} of {memory} are in the balloon, and {} available",
            left.available
        ));
        ensure!(
            size <= limit(memory) && size > Size::mib(500),
            "{size} of {memory} are in the balloon, and the limit is {}",
            limit(memory)
        );
        ensure!(setup.driver != Driver::C || size == limit(memory));
        let log = daemon.log()?;
        ensure!(
            log.contains(&format!(
                "the target of {} bytes would leave",
                target.as_bytes()
            )),
            "the daemon says {log}"
        );
        guest.touch(Size::mib(16))?;
        guest.rmmod(setup.driver)
    })?;
    daemon.end()
}
