// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What page sets are good for, in figures: side by side with what a user would have otherwise.

use std::fmt;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balloon_control::Encodings;
use serde_json::{Value, json};
use vm::{Config, Driver, Guest, HugePages, Load, MemoryBackend, Size};

use crate::sizes::offline_pages;
use crate::speed::{Times, median};
use crate::{EXTENDED_DEVICE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "page_sets_idle",
        proves: "7 of 8 GiB of an idle guest go and come back in a hundredth of the C driver's time",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: idle,
    },
    Scenario {
        name: "page_sets_touched",
        proves: "memory that the guest has used takes no longer than the host takes to free it",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: touched,
    },
    Scenario {
        name: "page_sets_fragmented",
        proves: "lone pages go in half of the C driver's time, and a bit for each page of the memory they lie in",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: fragmented,
    },
    Scenario {
        name: "page_sets_encodings",
        proves: "a guest names its pages in the shorter way, whatever became of its memory",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: encodings,
    },
    Scenario {
        name: "page_sets_huge_pages",
        proves: "of memory in huge pages the host gets all that is in the balloon",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: huge_pages,
    },
    Scenario {
        name: "page_sets_huge_pages_qemu",
        proves: "what is not in the balloon stays in the host's transparent huge pages, on QEMU's device, too",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: transparent_huge_pages,
    },
    Scenario {
        name: "page_sets_scale",
        proves: "a GiB takes no longer in a large guest than in a small one",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: scale,
    },
];

const RUNS: usize = 5;

/// How many runs there are of what is only to be looked at, where one takes half a minute.
const FEWER_RUNS: usize = 3;

/// The length of a page frame number of the base protocol.
const PFN_BYTES: u64 = 4;

/// The encodings that the driver can be made to use, by the value of its parameter.
const ENCODINGS: &[(u8, &str)] = &[(1, "ranges"), (2, "bitmaps"), (3, "page frame numbers")];

/// How long the guest may take to use its memory.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long all may take that is done with a guest that uses all of its memory.
const TIMEOUT: Duration = Duration::from_secs(400);

/// How long it takes to give memory away and to get it back.
#[derive(Default)]
struct RoundTrip {
    away: Times,
    back: Times,
}

/// What a guest has sent to inflate its balloon.
#[derive(Clone, Copy, Default)]
struct Sent {
    bytes: u64,
    messages: u64,
    notifications: u64,
    encodings: Encodings,
}

impl Sent {
    /// All that it has sent so far. Its device must be the daemon's.
    fn by(guest: &Guest) -> Result<Self> {
        let counters = guest.daemon()?.info()?.counters;
        Ok(Self {
            bytes: counters.received.inflate,
            messages: counters.messages.inflate,
            notifications: counters.notifications.inflate,
            encodings: counters.encodings,
        })
    }

    /// What it has sent since it had sent `before`.
    fn since(self, before: Self) -> Self {
        let (now, then) = (self.encodings, before.encodings);
        Self {
            bytes: self.bytes - before.bytes,
            messages: self.messages - before.messages,
            notifications: self.notifications - before.notifications,
            encodings: Encodings {
                pfns: now.pfns - then.pfns,
                ranges: now.ranges - then.ranges,
                bitmaps: now.bitmaps - then.bitmaps,
            },
        }
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes in {} messages ({} of ranges, {} bitmaps, {} of page frame numbers), {} notifications",
            self.bytes,
            self.messages,
            self.encodings.ranges,
            self.encodings.bitmaps,
            self.encodings.pfns,
            self.notifications
        )
    }
}

/// Inflates the balloon. Returns how long it took, and what was sent for it.
fn inflate(guest: &Guest, size: Size) -> Result<(Duration, Sent)> {
    let before = Sent::by(guest)?;
    let took = guest.balloon().settle(size)?;
    Ok((took, Sent::by(guest)?.since(before)))
}

fn idle(setup: &Setup) -> Result<()> {
    /// What of the C driver's time, and of virtio-mem's, page sets may take.
    const LIMIT: f64 = 0.01;
    const VIRTIO_MEM_LIMIT: f64 = 0.2;
    /// What of the bytes in an array of page frame numbers they may take.
    const BYTES_LIMIT: f64 = 0.001;
    let (memory, size) = (Size::gib(8), Size::gib(7));
    let (mut ours, mut theirs, mut virtio_mem) = (
        RoundTrip::default(),
        RoundTrip::default(),
        RoundTrip::default(),
    );
    let config = setup.config().memory(memory);
    let balloon = |driver, times: &mut RoundTrip, sent: &mut Sent| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let (took, now) = inflate(guest, size)?;
            times.away.add(took);
            times.back.add(guest.balloon().settle(Size::default())?);
            // The most of all runs.
            if now.bytes > sent.bytes {
                *sent = now;
            }
            Ok(())
        })
    };
    let (mut ours_sent, mut theirs_sent) = (Sent::default(), Sent::default());
    for _ in 0..RUNS {
        balloon(Driver::Rust, &mut ours, &mut ours_sent)?;
        balloon(Driver::C, &mut theirs, &mut theirs_sent)?;
        vm::run(
            &with_virtio_mem(setup.config(), memory - size, size),
            |guest| {
                plug(guest, size)?;
                virtio_mem.away.add(plug(guest, Size::default())?);
                virtio_mem.back.add(plug(guest, size)?);
                Ok(())
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
    let array = (size.as_pages() * PFN_BYTES) as f64;
    let of_array = ours_sent.bytes as f64 / array;
    setup.note(format!("page sets: {ours_sent}"));
    setup.note(format!(
        "C driver: {theirs_sent}; {array} bytes for each page's number"
    ));
    ensure!(
        of_array <= BYTES_LIMIT,
        "page sets take {of_array:.5} of an array of page frame numbers, not {BYTES_LIMIT}"
    );
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

/// A guest that uses its memory. An emulated processor that has it clears memory byte by byte, which takes much longer
/// than what is measured.
fn using_memory(config: Config) -> Config {
    config
        .argument("-cpu", "max,-erms,-fsrm,-fzrm")
        .timeout(TIMEOUT)
}

/// Has the guest use `size` of its memory and free it again.
fn touch(guest: &Guest, size: Size) -> Result<()> {
    let load = guest.load(Load::Touch {
        mib: size.as_mib().try_into()?,
    })?;
    load.wait_passes(1, PATIENCE)?;
    load.wait(PATIENCE)?;
    Ok(())
}

/// Ratios, of which the one in the middle counts.
#[derive(Default)]
struct Ratios(Vec<f64>);

impl Ratios {
    fn median(&self) -> f64 {
        median(&self.0)
    }
}

/// The median, and the least and the greatest one.
impl fmt::Display for Ratios {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratios = || self.0.iter().copied();
        let median = self.median();
        let (min, max) = (
            ratios().fold(median, f64::min),
            ratios().fold(median, f64::max),
        );
        write!(f, "{median:.3} ({min:.3} to {max:.3})")
    }
}

/// How long it takes to inflate with memory that the guest has not used, and with memory that it has.
#[derive(Default)]
struct Used {
    idle: Times,
    touched: Times,
}

impl Used {
    /// Measures both. Returns how much longer it takes with memory that was used, and how much the host gets then.
    fn measure(&mut self, guest: &Guest, size: Size) -> Result<(Duration, Size)> {
        let file = guest.memory_file()?;
        let idle = guest.balloon().settle(size)?;
        guest.balloon().settle(Size::default())?;

        touch(guest, size)?;
        let before = file.resident()?;
        let touched = guest.balloon().settle(size)?;
        let given_back = before.saturating_sub(file.resident()?);
        ensure!(
            given_back + Size::mib(512) > size,
            "the host got {given_back} of {size}"
        );
        self.idle.add(idle);
        self.touched.add(touched);
        Ok((touched.saturating_sub(idle), given_back))
    }
}

fn touched(setup: &Setup) -> Result<()> {
    /// What the host may take for many holes, of its time for one.
    const LIMIT: f64 = 1.2;
    let (memory, size) = (Size::gib(8), Size::gib(7));
    let config = using_memory(setup.config()).memory(memory);
    let (mut ours, mut theirs) = (Used::default(), Used::default());
    let (mut holes, mut ratios) = (Times::default(), Ratios::default());
    for _ in 0..RUNS {
        vm::run_and_kill(&config, |guest| {
            guest.insmod(Driver::Rust, &[])?;
            let (more, given_back) = ours.measure(guest, size)?;

            guest.balloon().settle(Size::default())?;
            touch(guest, size)?;
            guest.qmp().execute::<Value>("stop", &json!({}))?;
            let file = guest.memory_file()?;
            let all = file.resident()?;
            let took = file.punch()?;
            let punched = all.saturating_sub(file.resident()?);
            let hole = took.mul_f64(given_back.as_bytes() as f64 / punched.as_bytes() as f64);
            holes.add(hole);
            ratios.0.push(more.as_secs_f64() / hole.as_secs_f64());
            Ok(())
        })?;
        vm::run(&config, |guest| {
            guest.insmod(Driver::C, &[])?;
            theirs.measure(guest, size)?;
            Ok(())
        })?;
    }
    for (driver, used) in [("page sets", &ours), ("C driver", &theirs)] {
        setup.note(format!(
            "{driver}: inflating {size} of {memory} takes {}, and {} when the guest has used it",
            used.idle, used.touched
        ));
    }
    setup.note(format!(
        "as much in one hole: {holes}; page sets take {ratios} of that for what the guest has used"
    ));
    let ratio = ratios.median();
    ensure!(
        ratio <= LIMIT,
        "giving back what the guest has used takes {ratio:.2} of the time for one hole, not {LIMIT}"
    );
    Ok(())
}

/// Leaves a guest hardly any free memory but lone pages, and has it load a driver.
fn fragment<'a>(
    guest: &'a Guest,
    driver: Driver,
    parameters: &[&str],
) -> Result<vm::RunningLoad<'a>> {
    // By itself the kernel would begin to put the pages together.
    guest.write_file("/proc/sys/vm/compaction_proactiveness", "0")?;
    let taken = guest.free()?.saturating_sub(Size::mib(256));
    let load = guest.load(Load::Fragment {
        mib: taken.as_mib().try_into()?,
    })?;
    load.wait_passes(1, PATIENCE)?;
    guest.insmod(driver, parameters)?;
    Ok(load)
}

fn fragmented(setup: &Setup) -> Result<()> {
    /// What of the C driver's time page sets may take.
    const LIMIT: f64 = 0.5;
    /// What they may take of a bit for each page.
    const BITS_LIMIT: f64 = 1.01;
    let size = Size::gib(3);
    let config = using_memory(setup.config()).memory(Size::gib(8));
    let (mut ours, mut theirs, mut bits) = (Times::default(), Times::default(), Ratios::default());
    let mut last = Sent::default();
    let mut forced: Vec<(u8, &str, Times, Sent)> = ENCODINGS
        .iter()
        .map(|&(encoding, name)| (encoding, name, Times::default(), Sent::default()))
        .collect();
    for run in 0..RUNS {
        vm::run(&config, |guest| {
            let _load = fragment(guest, Driver::Rust, &[])?;
            let (took, sent) = inflate(guest, size)?;
            ours.add(took);
            bits.0
                .push((sent.bytes * 8) as f64 / stretch(guest)? as f64);
            last = sent;
            Ok(())
        })?;
        vm::run(&config, |guest| {
            let _load = fragment(guest, Driver::C, &[])?;
            theirs.add(inflate(guest, size)?.0);
            Ok(())
        })?;
        if run >= FEWER_RUNS {
            continue;
        }
        for (encoding, _, times, last) in &mut forced {
            vm::run(&config, |guest| {
                let parameter = format!("encoding={encoding}");
                let _load = fragment(guest, Driver::Rust, &[&parameter])?;
                let (took, sent) = inflate(guest, size)?;
                times.add(took);
                *last = sent;
                Ok(())
            })?;
        }
    }
    let ratio = ours.ratio(&theirs);
    setup.note(format!(
        "inflating {size} of lone pages: {ours}, C driver {theirs}, ratio {ratio:.2}"
    ));
    setup.note(format!(
        "{last}; {bits} bits for each page of the memory between the first and the last one"
    ));
    for (_, name, times, last) in &forced {
        setup.note(format!("{name} only: {times}, {last}"));
    }
    let bits = bits.median();
    ensure!(
        bits <= BITS_LIMIT,
        "there are {bits:.3} bits for each page, not {BITS_LIMIT}"
    );
    ensure!(
        ratio <= LIMIT,
        "page sets take {ratio:.2} of the C driver's time, not {LIMIT}"
    );
    Ok(())
}

/// How many pages of memory there are from the first to the last one that is in the balloon.
fn stretch(guest: &Guest) -> Result<u64> {
    let memory = memory_map(&guest.read_file("/proc/iomem")?);
    let end = memory.last().context("the guest has no memory")?.end;
    let first = nearest(end, |pages| Ok(offline_pages(guest, Some(pages))? > 0))?;
    let last = nearest(end, |pages| {
        let pages = end - pages.end..end - pages.start;
        Ok(offline_pages(guest, Some(pages))? > 0)
    })?;
    let pages = first..end - last;
    Ok(memory
        .iter()
        .map(|part| {
            let (start, end) = (part.start.max(pages.start), part.end.min(pages.end));
            end.saturating_sub(start)
        })
        .sum())
}

/// The memory in what /proc/iomem says, in pages.
fn memory_map(iomem: &str) -> Vec<Range<u64>> {
    let address = |text| u64::from_str_radix(text, 16).ok();
    iomem
        .lines()
        .filter_map(|line| {
            let (start, end) = line.strip_suffix(" : System RAM")?.split_once('-')?;
            Some(Size::bytes(address(start)?).as_pages()..Size::bytes(address(end)? + 1).as_pages())
        })
        .collect()
}

/// The least of the numbers up to `end` that is in a range for which `is_in` holds.
fn nearest(end: u64, mut is_in: impl FnMut(Range<u64>) -> Result<bool>) -> Result<u64> {
    let mut range = 0..1;
    while !is_in(range.clone())? {
        ensure!(range.end < end, "there is nothing to be found");
        range = range.end..(range.end * 2).min(end);
    }
    while range.end - range.start > 1 {
        let middle = range.start.midpoint(range.end);
        range = match is_in(range.start..middle)? {
            true => range.start..middle,
            false => middle..range.end,
        };
    }
    Ok(range.start)
}

fn encodings(setup: &Setup) -> Result<()> {
    let config = using_memory(setup.config()).memory(Size::gib(4));
    // Nearly all that is free, so that it is not only the best of it.
    let inflate = |guest: &Guest| -> Result<(Size, Sent)> {
        let size = guest.free()?.saturating_sub(Size::mib(256));
        Ok((size, inflate(guest, size)?.1))
    };
    let fresh = vm::run(&config, |guest| {
        guest.insmod(Driver::Rust, &[])?;
        inflate(guest)
    })?;
    let fragmented = vm::run(&config, |guest| {
        let _load = fragment(guest, Driver::Rust, &[])?;
        inflate(guest)
    })?;
    let long_running = vm::run(&config, |guest| {
        guest.insmod(Driver::Rust, &[])?;
        let _loads = use_for_long(guest)?;
        inflate(guest)
    })?;
    for (guest, (size, sent)) in [
        ("fresh", fresh),
        ("fragmented", fragmented),
        ("long-running", long_running),
    ] {
        setup.note(format!("{size} of a {guest} guest: {sent}"));
    }
    let (fresh, fragmented) = (fresh.1, fragmented.1);
    ensure!(
        fresh.encodings.bitmaps == 0,
        "a fresh guest sends bitmaps: {fresh}"
    );
    ensure!(
        fragmented.encodings.bitmaps > fragmented.encodings.ranges,
        "a fragmented guest sends hardly any bitmaps: {fragmented}"
    );
    Ok(())
}

/// Has processes come and go, until what is free lies between what some of them keep.
fn use_for_long(guest: &Guest) -> Result<Vec<vm::RunningLoad<'_>>> {
    const ROUNDS: usize = 8;
    let mut kept = Vec::new();
    for round in 0..ROUNDS {
        let holes = guest.load(Load::Fragment { mib: 512 })?;
        let data = guest.load(Load::Hold {
            mib: 32,
            threads: 1,
        })?;
        holes.wait_passes(1, PATIENCE)?;
        data.wait_passes(1, PATIENCE)?;
        // What comes now is between what the others have.
        let more = guest.load(Load::Hog { mib: 64 })?;
        touch(guest, Size::mib(256))?;
        guest.sh("dd if=/dev/zero of=/tmp/file bs=1M count=64 && rm /tmp/file")?;
        more.stop()?;
        if round % 2 == 0 {
            holes.stop()?;
            kept.push(data);
        } else {
            data.stop()?;
            kept.push(holes);
        }
    }
    Ok(kept)
}

fn huge_pages(setup: &Setup) -> Result<()> {
    let (memory, size) = (Size::gib(2), Size::gib(1));
    let pages = HugePages::reserve(memory)?;
    let config = setup
        .config()
        .memory(memory)
        .backend(MemoryBackend::Hugetlb)
        .preallocated();
    // How much the host has before and after inflating.
    let measure = |driver| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let before = pages.free()?;
            guest.balloon().settle(size)?;
            Ok((before, pages.free()?))
        })
    };
    for run in 0..FEWER_RUNS {
        let ours = measure(Driver::Rust)?;
        let theirs = measure(Driver::C)?;
        if run == 0 {
            let came = |(before, after): (Size, Size)| after.saturating_sub(before);
            setup.note(format!(
                "of {size} in huge pages the host gets {}, and {} with the C driver",
                came(ours),
                came(theirs)
            ));
        }
        let (before, after) = ours;
        ensure!(
            after == before + size,
            "the host has {after} when {size} are in the balloon, and had {before}"
        );
    }
    Ok(())
}

fn transparent_huge_pages(setup: &Setup) -> Result<()> {
    /// The least part of what is not in the balloon that has to be in huge pages.
    const LIMIT: f64 = 0.95;
    if !vm::has_transparent_huge_pages() {
        setup.skip("this machine gives no transparent huge pages to guests");
        return Ok(());
    }
    let (memory, size) = (Size::gib(8), Size::gib(4));
    let config = setup.config().memory(memory).preallocated();
    let measure = |driver, ratios: &mut Ratios| {
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let before = guest.transparent_huge_pages()?;
            ensure!(
                before.as_bytes() as f64 >= memory.as_bytes() as f64 * LIMIT,
                "only {before} of the guest's memory are in huge pages from the beginning"
            );
            guest.balloon().settle(size)?;
            let after = guest.transparent_huge_pages()?;
            ratios
                .0
                .push(after.as_bytes() as f64 / (memory - size).as_bytes() as f64);
            Ok(())
        })
    };
    let (mut ours, mut theirs) = (Ratios::default(), Ratios::default());
    for _ in 0..RUNS {
        measure(Driver::Rust, &mut ours)?;
        measure(Driver::C, &mut theirs)?;
    }
    setup.note(format!(
        "with {size} of {memory} in the balloon, {ours} of the rest is in huge pages, and {theirs} with the C driver"
    ));
    let ratio = ours.median();
    ensure!(
        ratio >= LIMIT,
        "{ratio:.3} of the rest is in huge pages, not {LIMIT}"
    );
    Ok(())
}

fn scale(setup: &Setup) -> Result<()> {
    /// What a GiB of the largest guest may take, of a GiB of one that is large enough not to measure what each guest
    /// takes.
    const LIMIT: f64 = 1.25;
    const REFERENCE: Size = Size::gib(4);
    let mut guests: Vec<(Size, Times, Times)> = [1, 2, 4, 8, 16]
        .map(|gib| (Size::gib(gib), Times::default(), Times::default()))
        .into();
    // The kernel cannot do without some of the smallest guest's memory.
    let part = |memory: Size| memory - Size::bytes(memory.as_bytes() / 8).max(Size::mib(256));
    for run in 0..RUNS {
        for (memory, ours, theirs) in &mut guests {
            for (driver, times) in [(Driver::Rust, ours), (Driver::C, theirs)] {
                // The C driver's figures are only to be looked at.
                if driver == Driver::C && run >= FEWER_RUNS {
                    continue;
                }
                vm::run(&setup.config().memory(*memory), |guest| {
                    guest.insmod(driver, &[])?;
                    times.add(guest.balloon().settle(part(*memory))?);
                    Ok(())
                })?;
            }
        }
    }
    let per_gib =
        |memory: Size, times: &Times| times.median() / part(memory).as_mib() as f64 * 1024.0;
    let mut reference = f64::MAX;
    for (memory, ours, theirs) in &guests {
        let each = per_gib(*memory, ours);
        setup.note(format!(
            "{} of {memory}: {ours}, {:.2} ms for each GiB; C driver {theirs}, {:.0} ms",
            part(*memory),
            each * 1e3,
            per_gib(*memory, theirs) * 1e3
        ));
        if *memory == REFERENCE {
            reference = each;
        }
        ensure!(
            *memory <= REFERENCE || each <= reference * LIMIT,
            "a GiB of {memory} takes {:.2} of a GiB of {REFERENCE}, not {LIMIT}",
            each / reference
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_from_the_rest() {
        let text = "00001000-0009fbff : System RAM\n\
                    000a0000-000bffff : PCI Bus 0000:00\n\
                    00100000-7ffdffff : System RAM\n  01000000-015362d7 : Kernel code\n";
        assert_eq!(memory_map(text), [1..0x9f, 0x100..0x7ffe0]);
    }

    #[test]
    fn the_nearest_is_found() {
        for number in [0, 1, 2, 5, 99] {
            let found = nearest(100, |range| Ok(range.contains(&number)));
            assert_eq!(found.unwrap(), number);
        }
        assert!(nearest(100, |_| Ok(false)).is_err());
    }
}
