// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest with two NUMA nodes. `oom` has the scenario with a full node.

use anyhow::{Result, ensure};
use vm::{Driver, Guest, Offer, PageFlag, Size};

use crate::compaction::{fullest_block_of, write};
use crate::floor::take_all;
use crate::hinting::{SLOW, Shares, check_all_back, wait_hints};
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, PATIENCE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::check_size;
use crate::statistics::{check_memory, newer, poll};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "two_nodes",
        proves: "each of two NUMA nodes keeps its part of the reserve, the driver hints both, and memory of each can go offline",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: two_nodes,
    },
    Scenario {
        name: "node_without_its_share",
        proves: "the balloon takes from another NUMA node what one node cannot give",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: node_without_its_share,
    },
];

/// The free memory of a node outside of `ZONE_MOVABLE`, of which the driver hints nothing.
fn kernel_free(guest: &Guest, node: u32) -> Result<Size> {
    let info = guest.read_file("/proc/zoneinfo")?;
    let (mut is_it, mut pages) = (false, 0);
    for line in info.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["Node", number, "zone", zone] => {
                is_it = number.trim_end_matches(',') == node.to_string() && zone != "Movable";
            }
            ["pages", "free", free] if is_it => pages += free.parse::<u64>()?,
            _ => (),
        }
    }
    Ok(Size::pages(pages))
}

/// Calls `what` for each of the two nodes.
pub(crate) fn on_both(what: impl Fn(u32) -> Result<Size>) -> Result<[Size; 2]> {
    Ok([what(0)?, what(1)?])
}

/// Checks that each of the two nodes has its part of a balloon of `size`.
pub(crate) fn check_nodes(setup: &Setup, guest: &Guest, size: Size) -> Result<()> {
    let nodes = on_both(|node| guest.node_balloon(node))?;
    setup.note(format!("the nodes gave {} and {}", nodes[0], nodes[1]));
    ensure!(
        nodes
            .iter()
            .all(|node| node.as_bytes() * 5 > size.as_bytes() * 2),
        "the nodes gave {} and {} of {size}",
        nodes[0],
        nodes[1]
    );
    Ok(())
}

fn two_nodes(setup: &Setup) -> Result<()> {
    // Memory blocks can certainly go offline if all of their pages are movable.
    let config = setup
        .config()
        .memory(Size::mib(1536))
        .nodes(2)
        .parameter("movablecore=768M")
        .offer(&[Offer::FreePageHint]);
    vm::run(&config, |guest| {
        poll(guest)?;
        if setup.driver == Driver::Rust {
            guest.insmod(setup.driver, &[])?;
            floor(setup, guest)?;
            guest.rmmod(setup.driver)?;
        }
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        hints(setup, guest)?;
        offline(setup, guest)?;
        guest.rmmod(setup.driver)
    })
}

/// Inflates the balloon as far as possible, and then reads the statistics.
fn floor(setup: &Setup, guest: &Guest) -> Result<()> {
    // More than a quarter of the reserve of a guest of 1 GiB.
    const LEAST: Size = Size::mib(64);
    let size = take_all(guest)?;
    check_nodes(setup, guest, size)?;
    let left = on_both(|node| guest.node_free(node))?;
    setup.note(format!("and have {} and {} left", left[0], left[1]));
    ensure!(
        left.iter().all(|&left| left > LEAST),
        "the nodes have {} and {} left",
        left[0],
        left[1]
    );
    let sample = newer(guest, 0)?;
    check_memory(guest, &newer(guest, sample.taken)?)?;
    guest.balloon().settle(Size::default())?;
    Ok(())
}

/// Begins to migrate the guest, and checks that the driver has hinted memory of both nodes.
fn hints(setup: &Setup, guest: &Guest) -> Result<()> {
    let balloon = Size::mib(128);
    let shares = Shares::of(guest)?;
    guest.balloon().settle(balloon)?;
    let free = shares.write_and_free(guest)?;
    let before = on_both(|node| kernel_free(guest, node))?;
    let migration = guest.migrate(SLOW)?;
    wait_hints(guest, &migration, &shares)?;
    let meanwhile = on_both(|node| kernel_free(guest, node))?;
    setup.note(format!(
        "{} and {} were free, and {} and {} when they were hinted",
        before[0], before[1], meanwhile[0], meanwhile[1]
    ));
    let nodes = || before.iter().zip(&meanwhile);
    ensure!(
        nodes().all(|(&before, &meanwhile)| meanwhile + Size::mib(128) < before),
        "one node is not hinted"
    );
    ensure!(
        setup.driver == Driver::C
            || nodes().all(|(before, meanwhile)| meanwhile.as_bytes() * 10 > before.as_bytes()),
        "one node has less than a tenth of its free memory left"
    );
    // The guest cannot continue with two nodes here, see `Migration::finish`.
    migration.cancel()?;
    check_all_back(guest, free)?;
    check_size(guest, balloon)
}

/// Takes a memory block of each node offline, and online again.
fn offline(setup: &Setup, guest: &Guest) -> Result<()> {
    // More than the other zones of a node have: some of it is in movable memory of each node.
    let size = Size::mib(900);
    guest.balloon().settle(size)?;
    let total = guest.meminfo()?.total;
    for node in [0, 1] {
        let directory = format!("/sys/devices/system/node/node{node}");
        let block = fullest_block_of(guest, &directory, "^Movable", PageFlag::Offline)?;
        let pages = guest.offline_pages(Some(block.pages.clone()))?;
        write(guest, &block.state, "offline")?;
        // The balloon then inflates elsewhere.
        guest.balloon().reach(size)?;
        check_size(guest, size)?;
        write(guest, &block.state, "online_movable")?;
        setup.note(format!(
            "{pages} pages of the balloon were in the memory of node {node} that went offline"
        ));
        ensure!(
            pages > 0 || setup.driver == Driver::C,
            "the balloon has no memory of node {node}"
        );
        let now = guest.meminfo()?.total;
        ensure!(now == total, "the guest had {total}, and has {now}");
    }
    guest.balloon().settle(Size::default())?;
    check_size(guest, Size::default())
}

fn node_without_its_share(setup: &Setup) -> Result<()> {
    vm::run(&setup.config().nodes(2), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let free = guest.node_free(0)?;
        pin(guest)?;
        let pinned = free.saturating_sub(guest.node_free(0)?);
        ensure!(pinned > Size::mib(96), "only {pinned} of node 0 are pinned");

        let free = on_both(|node| guest.node_free(node))?;
        let size = (free[0] + free[1]).saturating_sub(Size::mib(112));
        guest.balloon().settle(size)?;
        let gave = on_both(|node| guest.node_balloon(node))?;
        setup.note(format!(
            "{pinned} of node 0 are pinned; of {} and {} the nodes gave {} and {}",
            free[0], free[1], gave[0], gave[1]
        ));
        ensure!(
            !guest.console().text()?.contains("retrying with pauses"),
            "the balloon stopped on its way to {size}"
        );
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// Makes files on node 0 that have no content: their names and inodes count as memory that can be reclaimed, and never
/// are.
fn pin(guest: &Guest) -> Result<()> {
    let name = "n".repeat(200);
    guest.sh(
        "echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control && mkdir /sys/fs/cgroup/pin /tmp/pin &&
         echo 0 >/sys/fs/cgroup/pin/cpuset.mems && mount -t ramfs pin /tmp/pin",
    )?;
    let line = format!(
        "echo $$ >/sys/fs/cgroup/pin/cgroup.procs && cd /tmp/pin &&
         i=0 && while [ $i -lt 150000 ]; do : >{name}$i; i=$((i + 1)); done"
    );
    guest.exec_within(&["sh", "-c", &line], PATIENCE)?;
    Ok(())
}
