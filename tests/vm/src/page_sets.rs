// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What page sets are good for, in figures: side by side with what a user would have otherwise.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vm::{Config, Driver, Guest, Size};

use crate::speed::Times;
use crate::{EXTENDED_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "page_sets_idle",
    proves: "7 of 8 GiB of an idle guest go and come back in a hundredth of the C driver's time",
    kernels: TEST_KERNEL,
    drivers: RUST_DRIVER,
    devices: EXTENDED_DEVICE,
    run: idle,
}];

const RUNS: usize = 5;

/// What of the C driver's time, and of virtio-mem's, page sets may take.
const LIMIT: f64 = 0.01;
const VIRTIO_MEM_LIMIT: f64 = 0.2;

/// How long it takes to give memory away and to get it back.
#[derive(Default)]
struct RoundTrip {
    away: Times,
    back: Times,
}

impl RoundTrip {
    fn measure(
        &mut self,
        mut resize: impl FnMut(Size) -> Result<Duration>,
        size: Size,
    ) -> Result<()> {
        self.away.add(resize(size)?);
        self.back.add(resize(Size::default())?);
        Ok(())
    }
}

fn idle(setup: &Setup) -> Result<()> {
    let (memory, size) = (Size::gib(8), Size::gib(7));
    let (mut ours, mut theirs, mut virtio_mem) = (
        RoundTrip::default(),
        RoundTrip::default(),
        RoundTrip::default(),
    );
    let config = setup.config().memory(memory);
    let balloon = |driver, times: &mut RoundTrip| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            times.measure(|size| guest.balloon().settle(size), size)
        })
    };
    for _ in 0..RUNS {
        balloon(Driver::Rust, &mut ours)?;
        balloon(Driver::C, &mut theirs)?;
        vm::run(
            &with_virtio_mem(setup.config(), memory - size, size),
            |guest| {
                plug(guest, size)?;
                virtio_mem.measure(|taken| plug(guest, size - taken), size)
            },
        )?;
    }

    let mut limits = Vec::new();
    for (what, ours, theirs, virtio_mem) in [
        ("inflating", &ours.away, &theirs.away, &virtio_mem.away),
        ("deflating", &ours.back, &theirs.back, &virtio_mem.back),
    ] {
        let (of_theirs, of_virtio_mem) = (ours.ratio(theirs), ours.ratio(virtio_mem));
        setup.note(format!(
            "{what} {size} of {memory}: {ours}, C driver {theirs} ({:.0} times), virtio-mem {virtio_mem} ({:.1} times)",
            1.0 / of_theirs,
            1.0 / of_virtio_mem
        ));
        limits.push((what, of_theirs, of_virtio_mem));
    }
    for (what, of_theirs, of_virtio_mem) in limits {
        ensure!(
            of_theirs <= LIMIT,
            "{what} takes {of_theirs:.4} of the C driver's time, not {LIMIT}"
        );
        ensure!(
            what != "inflating" || of_virtio_mem <= VIRTIO_MEM_LIMIT,
            "{what} takes {of_virtio_mem:.2} of virtio-mem's time, not {VIRTIO_MEM_LIMIT}"
        );
    }
    Ok(())
}

/// A guest with `base` of memory and up to `more` from a virtio-mem device.
fn with_virtio_mem(config: Config, base: Size, more: Size) -> Config {
    config
        .memory(base)
        .balloon(None)
        .parameter("memhp_default_state=online_movable")
        .argument("-m", &format!("maxmem={}B", (base + more).as_bytes()))
        .argument(
            "-object",
            &format!("memory-backend-ram,id=more,size={}", more.as_bytes()),
        )
        .extra_device("virtio-mem-pci,id=more0,memdev=more,requested-size=0")
}

/// Has the virtio-mem device give the guest `size`. Returns how long it took.
fn plug(guest: &Guest, size: Size) -> Result<Duration> {
    const INTERVAL: Duration = Duration::from_millis(5);
    const PATIENCE: Duration = Duration::from_secs(30);
    let qmp = guest.qmp();
    let start = Instant::now();
    qmp.execute::<Value>(
        "qom-set",
        &json!({ "path": "/machine/peripheral/more0", "property": "requested-size", "value": size.as_bytes() }),
    )?;
    loop {
        let devices: Value = qmp.execute("query-memory-devices", &json!({}))?;
        let plugged = devices[0]["data"]["size"].as_u64().context("a size")?;
        if plugged == size.as_bytes() {
            return Ok(start.elapsed());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{} of {size} are plugged",
            Size::bytes(plugged)
        );
        thread::sleep(INTERVAL);
    }
}
