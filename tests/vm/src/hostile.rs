// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that violate the protocol or do not respond, and guests that keep running.

use std::cell::{Cell, OnceCell};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vm::{Driver, Guest, Hostile, Link, Load, MemoryBackend, Size};

use crate::scenario::{BOTH_DRIVERS, BOTH_KERNELS, PATIENCE, QEMU_DEVICE, Scenario, Setup};
use crate::sizes::{check_free, check_size};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile",
        proves: "whatever a device does, the guest keeps running, and its next balloon works",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: |setup| hostile(setup, Link::VhostUser),
    },
    Scenario {
        name: "hostile_pci",
        proves: "the same for a whole PCI device, without a virtio device of QEMU in between",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: |setup| hostile(setup, Link::VfioUser),
    },
];

/// For how long devices are plugged, of each form, without `SEEDS=`.
const TIME: Duration = Duration::from_secs(30);

/// The seeds that once found a bug. They come first.
const FOUND: &[u64] = &[26, 127, 227, 380, 536, 610, 793, 903, 1232];
const FOUND_AS_PCI: &[u64] = &[4, 56];

/// How many devices one guest gets at most. The guest's log grows with each device, and the test
/// reads it repeatedly.
const DEVICES_PER_GUEST: usize = 100;

/// How long a driver may take to bind to a device. It never binds to some, which lack a queue.
const BIND: Duration = Duration::from_secs(3);

/// By how much free memory fluctuates: the kernel's caches, and KASAN's quarantine.
pub(crate) const NOISE: Size = Size::mib(64);

fn hostile(setup: &Setup, link: Link) -> Result<()> {
    let known = match (setup.seeds(), link) {
        (Some(_), _) => &[],
        (None, Link::VhostUser) => FOUND,
        (None, Link::VfioUser) => FOUND_AS_PCI,
    };
    // The time starts with the first device.
    let begun = OnceCell::<Instant>::new();
    let in_time =
        || setup.seeds().is_some() || begun.get().is_none_or(|begun| begun.elapsed() < TIME);
    let others = setup.seeds().unwrap_or(0..u64::MAX);
    let others = others.take_while(|_| in_time());
    let mut seeds = known.iter().copied().chain(others).peekable();
    let (mut plugged, mut lost, mut bugs) = (0, 0, 0);
    let idle = Cell::new(0);
    while seeds.peek().is_some() {
        let is_lost = Cell::new(false);
        let these = seeds.by_ref().inspect(|_| {
            begun.get_or_init(Instant::now);
            plugged += 1;
        });
        let result = suffer(setup, link, these.take(DEVICES_PER_GUEST), &is_lost, &idle);
        match result {
            Ok(()) => {}
            // QEMU is the device's peer, too, and is not under test.
            Err(_) if is_lost.get() => lost += 1,
            result => {
                bugs += 1;
                setup.tolerate(result)?;
            }
        }
    }
    // A failure ends the guest, and concerns one device.
    let idle = idle.get();
    let endured = plugged - lost - bugs - idle;
    setup.note(format!(
        "{endured} of {plugged} devices passed, {idle} had no driver; QEMU crashed {lost} times, {bugs} bugs"
    ));
    ensure!(
        endured + bugs > 0,
        "QEMU has crashed each time, or no device had a driver, so nothing was tested"
    );
    Ok(())
}

/// Boots a guest and plugs the devices of these seeds, one after the other, and then a well-behaved one. Sets
/// `is_lost` if QEMU has crashed, and counts in `idle` the devices that no driver has bound to.
fn suffer(
    setup: &Setup,
    link: Link,
    seeds: impl Iterator<Item = u64>,
    is_lost: &Cell<bool>,
    idle: &Cell<u32>,
) -> Result<()> {
    let config = setup
        .config()
        .backend(MemoryBackend::Memfd)
        .hotplug_port()
        .balloon(None);
    vm::run(&config, |guest| {
        let (total, free) = (guest.meminfo()?.total, guest.free()?);
        // More than the load may still need: an unresponsive device holds the memory that it was
        // given.
        let parameters: &[&str] = match setup.driver {
            Driver::C => &[],
            _ => &["floor_mib=256"],
        };
        guest.insmod(setup.driver, parameters)?;
        let load = guest.load(Load::Churn {
            mib: 64,
            threads: 1,
            seed: 0,
        })?;
        let beside = guest.free()?;
        for seed in seeds {
            let has_driver = endure(guest, link, seed, total, beside)
                .inspect_err(|_| is_lost.set(guest.is_lost()))
                .with_context(|| format!("the device of seed {seed}"))?;
            idle.set(idle.get() + u32::from(!has_driver));
        }
        load.verify(10)?;
        load.stop()?;

        guest.plug_balloon(
            &json!({ "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port0" }),
        )?;
        for size in [Size::mib(300), Size::default()] {
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        guest.rmmod(setup.driver)?;
        check_free(guest, free)
    })
}

/// Plugs and unplugs the device of `seed`, and checks that nothing of it is left. Without the device the guest had
/// `total` memory, and `free` of it was free. Returns whether a driver has bound to the device.
fn endure(guest: &Guest, link: Link, seed: u64, total: Size, free: Size) -> Result<bool> {
    guest.write_file("/dev/kmsg", &format!("the device of seed {seed}"))?;
    let device = Hostile::start(guest, link, seed, &[])?;
    device.plug(guest, "port0")?;
    let has_driver = device.wait_within(guest, BIND)?;
    guest.unplug_balloon()?;
    device.forget(guest)?;
    let faults = guest.console().faults(&[])?;
    ensure!(faults.is_empty(), "the guest's kernel reports: {faults:?}");
    let pages = guest.vmstat("nr_balloon_pages")?;
    ensure!(pages == 0, "{pages} pages went with the device");
    let now = guest.meminfo()?.total;
    ensure!(now == total, "the guest had {total}, and has {now}");
    // Only free memory shows whether the guest has its hinted memory back.
    guest.wait_until("free memory as before", PATIENCE, || {
        Ok(guest.free()? + NOISE > free)
    })?;
    Ok(has_driver)
}
