// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demonstration: inflates and deflates 7 of a guest's 8 GiB, with the C driver and with this repository's,
//! on QEMU's device and on this repository's.

use std::time::Duration;
use std::{fmt, iter};

use anyhow::{Context, Result, ensure};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use procfs::{Current, Meminfo};
use vm::{Artifacts, Balloon, Config, Device, Driver, Kernel, Load, Size};

use crate::cli::Guests;
use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::setup;

const MEMORY: Size = Size::gib(8);
const TARGET: Size = Size::gib(7);

/// How much the guest uses and frees, so that the host can get memory back.
const TOUCHED: Size = Size::gib(2);

/// QEMU's own memory and that of the tools, in addition to the guest's.
const OVERHEAD: Size = Size::gib(1);

/// A driver and its device.
#[derive(Clone, Copy)]
struct Contestant {
    driver: Driver,
    device: Device,
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.driver.name(), self.device)
    }
}

/// The first one is the baseline.
const CONTESTANTS: [Contestant; 3] = [
    Contestant {
        driver: Driver::C,
        device: Device::Qemu,
    },
    Contestant {
        driver: Driver::Rust,
        device: Device::Qemu,
    },
    Contestant {
        driver: Driver::Rust,
        device: Device::Extended,
    },
];

/// The results of one of them.
struct Measurement {
    inflate: Duration,
    deflate: Duration,
    /// nr_balloon_pages of the guest when the balloon is full.
    pages: u64,
    /// How much less memory QEMU has after inflating, when the guest had used it.
    given_back: Size,
    free_before: Size,
    free_after: Size,
}

/// Runs the demonstration and prints its table.
pub(crate) fn run(guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    check_memory(MEMORY)?;
    let artifacts = setup::prepare(&places, Kernel::Test)?;
    let measurements = CONTESTANTS
        .into_iter()
        .map(|contestant| measure(&artifacts, contestant, guests))
        .collect::<Result<Vec<_>>>()?;
    println!("\n{}", table(&measurements));
    println!(
        "An idle guest of {MEMORY} inflates its balloon to {TARGET} and deflates it. What the host\n\
         gets back is measured in a second round, after the guest has used and freed {TOUCHED}."
    );
    Ok(true)
}

/// Checks that the host has memory for so much in guests: a machine that swaps measures its disk.
pub(crate) fn check_memory(guests: Size) -> Result<()> {
    let needed = guests + OVERHEAD;
    let available = Meminfo::current()?.mem_available;
    let available = Size::bytes(available.context("/proc/meminfo has no MemAvailable")?);
    ensure!(
        available >= needed,
        "{available} of memory is available and the demo needs {needed}; free some, or use a machine with more"
    );
    Ok(())
}

fn measure(artifacts: &Artifacts, contestant: Contestant, guests: Guests) -> Result<Measurement> {
    let Contestant { driver, device } = contestant;
    let config = Config::new(artifacts, "demo")
        .device(device)
        .memory(MEMORY)
        .accel(guests.accel())
        .verbose(guests.verbose);
    let booting = Phase::start(&format!("{contestant}: booting"), None);
    let measurement = vm::run(&config, |guest| {
        guest.insmod(driver, driver.low_floor())?;
        booting.finish();
        let balloon = guest.balloon();
        let free_before = guest.meminfo()?.free;
        let inflate = settle(contestant, "inflating", balloon, TARGET)?;
        let pages = guest.vmstat("nr_balloon_pages")?;
        let deflate = settle(contestant, "deflating", balloon, Size::default())?;

        let using = Phase::start(&format!("{contestant}: the guest works"), None);
        let mib = usize::try_from(TOUCHED.as_mib())?;
        guest.load(Load::Touch { mib })?.wait()?;
        using.finish();
        let used = guest.resident()?;
        settle(contestant, "inflating again", balloon, TARGET)?;
        let given_back = used.saturating_sub(guest.resident()?);
        settle(contestant, "deflating again", balloon, Size::default())?;
        let free_after = guest.meminfo()?.free;
        guest.rmmod(driver)?;
        Ok(Measurement {
            inflate,
            deflate,
            pages,
            given_back,
            free_before,
            free_after,
        })
    });
    measurement.with_context(|| {
        format!(
            "the guest with {contestant} fails, its log is in {}",
            config.logs().display()
        )
    })
}

/// Sets the balloon's size, and shows the progress.
fn settle(
    contestant: Contestant,
    what: &str,
    balloon: Balloon<'_>,
    target: Size,
) -> Result<Duration> {
    let from = balloon.size()?;
    let way = from.abs_diff(target);
    let phase = Phase::start(&format!("{contestant}: {what}"), Some(way.as_pages()));
    let took = balloon.settle_watched(target, |now| {
        phase.set(now.abs_diff(from).as_pages());
        phase.say(&now.to_string());
    })?;
    phase.finish();
    Ok(took)
}

fn table(measurements: &[Measurement]) -> Table {
    let mut table = Table::new();
    // In three lines, so that the table is not wider than a terminal.
    let names = CONTESTANTS.map(|Contestant { driver, device }| {
        let device = device.to_string().replace(" with ", "\nwith ");
        format!("{}\n{device}", driver.name())
    });
    table
        .load_preset(UTF8_FULL_CONDENSED)
        .set_header(iter::once(String::new()).chain(names));
    let mut row = |what: &str, show: &dyn Fn(&Measurement) -> String| {
        table.add_row(iter::once(what.to_owned()).chain(measurements.iter().map(show)));
    };
    let milliseconds = |time: Duration| format!("{} ms", time.as_millis());
    // The time of the first one relative to this one.
    let times = |time: fn(&Measurement) -> Duration| {
        let first = measurements.first().map_or(Duration::ZERO, time);
        move |this: &Measurement| format!("{:.1}", first.as_secs_f64() / time(this).as_secs_f64())
    };
    row("inflate", &|m| milliseconds(m.inflate));
    row("  times as fast", &times(|m| m.inflate));
    row("deflate", &|m| milliseconds(m.deflate));
    row("  times as fast", &times(|m| m.deflate));
    row("nr_balloon_pages at the top", &|m| m.pages.to_string());
    row("memory returned to the host", &|m| m.given_back.to_string());
    row("guest's MemFree before", &|m| m.free_before.to_string());
    row("guest's MemFree after", &|m| m.free_after.to_string());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
