// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that runs out of memory deflates the balloon, if the host allows it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm::{Driver, Exit, Guest, Load, Offer, Output, RunningLoad, Size};

use crate::nodes::{check_nodes, on_both};
use crate::reporting::wait_until_taken;
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, CALLBACK_KERNELS, OOM, PATIENCE, RUST_DRIVER,
    Scenario, Setup, TEST_KERNEL,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "deflate_on_oom",
        proves: "a process that needs more memory than is left survives, because the balloon deflates",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: ALL_DEVICES,
        run: deflate_on_oom,
    },
    Scenario {
        name: "oom_while_inflating",
        proves: "a process that needs the same memory as an inflating balloon gets it and survives",
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
        proves: "memory that a process got by deflate on OOM is not inflated again at once",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: no_swing_after_oom,
    },
];

/// The available memory of an idle guest. The balloon takes three quarters of it, and a process
/// needs half.
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

    /// Starts a process that allocates its share.
    fn start<'a>(&self, guest: &'a Guest) -> Result<RunningLoad<'a>> {
        guest.start_load(Load::Hog { mib: self.need })
    }

    /// Starts a process that allocates its share, and waits until it has all of it.
    fn start_and_wait<'a>(&self, guest: &'a Guest) -> Result<RunningLoad<'a>> {
        let load = self.start(guest)?;
        self.wait(guest, &load)?;
        Ok(load)
    }

    /// Waits until a process has all of its share.
    fn wait(&self, guest: &Guest, load: &RunningLoad<'_>) -> Result<()> {
        wait_until_taken(guest, load, self.need)
    }
}

const ON: &[Offer] = &[Offer::DeflateOnOom];

fn deflate_on_oom(setup: &Setup) -> Result<()> {
    let config = setup.config().nodes(2).offer(ON).expect(OOM);
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let total = guest.meminfo()?.total;
        let shares = Shares::of(guest)?;
        guest.balloon().settle(shares.balloon)?;
        if setup.driver == Driver::Rust {
            check_nodes(setup, guest, shares.balloon)?;
        }
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
        guest.write_file("/proc/sys/vm/oom_kill_allocating_task", "1")?;
        guest.sh(&format!(
            "echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control && mkdir {0} && echo 0 >{0}/cpuset.mems",
            Bound::GROUP
        ))?;
        for bound in [Bound::Cpuset, Bound::Policy] {
            oom_on_one_node(setup, guest, bound)?;
        }
        guest.rmmod(setup.driver)
    })
}

/// A way to bind a process to a node.
#[derive(Clone, Copy, Debug)]
enum Bound {
    /// The memory policy of the file system that the process writes to.
    Policy,
    /// A cpuset.
    Cpuset,
}

impl Bound {
    const GROUP: &str = "/sys/fs/cgroup/node";

    /// Starts a process that fills a file with memory of node 0. The kernel may kill it.
    fn fill(self, guest: &Guest, size: Size) -> Result<Output> {
        let (policy, join) = match self {
            Self::Policy => (",mpol=bind:0", String::new()),
            Self::Cpuset => ("", format!("echo $$ >{}/cgroup.procs && ", Self::GROUP)),
        };
        guest.sh(&format!(
            "mkdir -p /tmp/node && mount -t tmpfs -o size=100%{policy} node /tmp/node"
        ))?;
        let dd = format!(
            "dd if=/dev/zero of=/tmp/node/file bs=1M count={}",
            size.as_mib()
        );
        // The kernel would not kill a process of the agent.
        let line = format!("echo 0 >/proc/self/oom_score_adj && {join}exec {dd}");
        let output = guest.exec_within(&["sh", "-c", &line], PATIENCE)?;
        guest.sh("umount /tmp/node")?;
        Ok(output)
    }
}

/// A process that is bound to one node fills a file, first with less memory than the node has in the balloon, and then
/// with more than the node has.
fn oom_on_one_node(setup: &Setup, guest: &Guest, bound: Bound) -> Result<()> {
    // Ends the pause after the previous OOM.
    guest.balloon().settle(Size::default())?;
    guest.balloon().settle(Size::mib(400))?;
    let balloons = || on_both(|node| guest.node_balloon(node));
    let words = |nodes: [Size; 2]| format!("{} and {}", nodes[0], nodes[1]);
    let before = balloons()?;
    let free = guest.node_free(0)?;
    let kills = || guest.vmstat("oom_kill");
    let killed = kills()?;
    let output = bound.fill(guest, free + Size::mib(64))?;
    let helped = output.exit == Exit::Status(0) && kills()? == killed;
    let some = balloons()?;
    bound.fill(guest, Size::gib(1))?;
    let after = balloons()?;
    setup.note(format!(
        "{bound:?}: the nodes had {} in the balloon, {} when a process {} its memory, and {} at the end",
        words(before),
        words(some),
        if helped { "had got" } else { "was killed for" },
        words(after)
    ));
    ensure!(kills()? > killed, "a process has more memory than the node");
    if setup.driver == Driver::Rust {
        ensure!(
            helped,
            "the balloon returns no memory of the node to a process: {output:?}"
        );
        ensure!(
            after[0] < before[0] && after[1] >= before[1],
            "{} were in the balloon, and {} after node 0 was out of memory",
            words(before),
            words(after)
        );
    }
    Ok(())
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
            // So that both allocate the same memory.
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
            "the balloon reached its target before the process had its memory"
        );
        setup.note(format!(
            "the balloon was still inflating {on_the_way} of 3 times"
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
        ensure!(killed == 1, "{killed} processes were killed instead of one");
        let left = guest.balloon().size()?;
        ensure!(
            left == shares.balloon,
            "the balloon has {left} instead of {}",
            shares.balloon
        );
        guest.rmmod(setup.driver)
    })
}

fn no_swing_after_oom(setup: &Setup) -> Result<()> {
    /// The driver waits for ten seconds, by another clock than the trace.
    const PAUSE: Duration = Duration::from_secs(9);
    // An eighth of such a balloon is much more than the kernel's watermarks.
    vm::run(&setup.config().memory(Size::gib(4)).offer(ON), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        guest.balloon().settle(shares.balloon)?;
        let (_, events) = guest.trace_balloon_times(|| {
            let load = shares.start_and_wait(guest)?;
            load.stop()?;
            // The memory is free again, and the target has not changed. The host sets the same target
            // again. After the pause the balloon inflates.
            guest.balloon().settle(shares.balloon)
        })?;
        let is_oom = |(_, event): &(_, String)| event.contains("out-of-memory");
        let first = events.iter().position(is_oom);
        let first = first.context("the balloon has not deflated")?;
        check_share(setup, guest, shares.balloon, &events[first].1)?;
        let last = events.iter().rposition(is_oom).unwrap_or(first);
        let (oom, then) = (events[last].0, events.get(last + 1));
        let (time, event) = then.context("the balloon has not inflated again")?;
        let pause = time.saturating_sub(oom);
        setup.note(format!(
            "{pause:.1?} from the last deflate on OOM to the next inflate"
        ));
        ensure!(
            event.starts_with("inflate") && pause >= PAUSE,
            "{event} {pause:.1?} after the guest was out of memory"
        );

        // The guest does not run out of memory again.
        let killed = guest.vmstat("oom_kill")?;
        ensure!(killed == 0, "{killed} processes were killed");
        guest.rmmod(setup.driver)
    })
}

/// Checks by how much a balloon of `size` has deflated in `event`, the first one.
fn check_share(setup: &Setup, guest: &Guest, size: Size, event: &str) -> Result<()> {
    let (_, rest) = event.split_once("pages=").context("no number of pages")?;
    let pages: u64 = rest.split(' ').next().unwrap_or_default().parse()?;
    let deflated = guest.page_size() * pages;
    setup.note(format!("{deflated} of {size} came back at once"));
    ensure!(
        deflated.as_mib() >= size.as_mib() / 8,
        "{deflated} of {size} came back at once, which is less than an eighth"
    );
    Ok(())
}
