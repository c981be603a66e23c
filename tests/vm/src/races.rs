// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Everything at once. In the guest, the driver is bound and unbound, loaded and unloaded, and
//! memory is compacted. Meanwhile the host plugs and unplugs the device, sets targets, makes
//! requests, and suspends the guest's devices.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use balloon_control::{Begun, Request};
use fastrand::Rng;
use serde_json::{Value, json};
use vm::{Daemon, Device, Driver, Guest, Kernel, Load, MemoryBackend, Size};

use crate::lifecycle::driver_directory;
use crate::overwriting::unused;
use crate::scenario::{PATIENCE, RUST_DRIVER, Scenario, Setup};
use crate::sizes::check_free;

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "races",
    proves: "the driver loses no memory, and works afterwards, whatever happens at the same time",
    kernels: &[Kernel::Debug, Kernel::Kcsan],
    drivers: RUST_DRIVER,
    devices: &[Device::Extended, Device::Qemu],
    run: races,
}];

/// The duration without `TIME=`.
const TIME: Duration = Duration::from_secs(60);

/// The longest duration in one guest.
const TIME_PER_GUEST: Duration = Duration::from_secs(300);

/// The file that makes the guest's processes end.
const OVER: &str = "/tmp/over";

const KCSAN: &str = "BUG: KCSAN: ";

fn races(setup: &Setup) -> Result<()> {
    let first = match setup.seeds() {
        Some(seeds) => seeds.start,
        None => SystemTime::UNIX_EPOCH.elapsed()?.as_secs(),
    };
    let time = setup.time().unwrap_or(TIME);
    let guests = time.as_secs().div_ceil(TIME_PER_GUEST.as_secs()).max(1);
    let each = Duration::from_secs(time.as_secs() / guests);
    setup.note(format!("{guests} guests, from seed {first} on"));
    let (mut counts, mut lost) = (Counts::default(), 0);
    for seed in first..first + guests {
        let is_lost = Cell::new(false);
        match race(setup, seed, each, &mut counts, &is_lost) {
            // QEMU crashes when the configuration changes while the driver is being unbound. QEMU
            // is not under test.
            Err(_) if is_lost.get() => lost += 1,
            result => result.with_context(|| format!("with the seed {seed}"))?,
        }
    }
    setup.note(counts.describe(each));
    ensure!(
        lost < guests,
        "QEMU has crashed each time, so nothing was tested"
    );
    setup.note(format!("QEMU crashed {lost} times"));
    Ok(())
}

/// Runs everything for `time` in a guest. Sets `is_lost` if QEMU has crashed.
fn race(
    setup: &Setup,
    seed: u64,
    time: Duration,
    counts: &mut Counts,
    is_lost: &Cell<bool>,
) -> Result<()> {
    let config = setup
        .config()
        .backend(MemoryBackend::Memfd)
        .hotplug_port()
        .balloon(None)
        // Some are the kernel's own. The test checks them at the end.
        .expect("kmemleak: [0-9]+ new suspected");
    let config = match setup.kernel {
        Kernel::Kcsan => config.expect(KCSAN),
        _ => config,
    };
    vm::run(&config, |guest| {
        let result =
            at_once(setup, guest, seed, time, counts).inspect_err(|_| is_lost.set(guest.is_lost()));
        if setup.kernel == Kernel::Kcsan {
            check_races(setup, guest)?;
        }
        result
    })
}

/// Runs everything, and checks the result.
fn at_once(
    setup: &Setup,
    guest: &Guest,
    seed: u64,
    time: Duration,
    counts: &mut Counts,
) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let (total, free) = (guest.meminfo()?.total, guest.free()?);
    let load = guest.load(Load::Churn {
        mib: 64,
        threads: 2,
        seed,
    })?;
    if setup.kernel == Kernel::Kcsan {
        guest.write_file("/sys/kernel/debug/kcsan", "on")?;
    }
    guest.insmod(setup.driver, &[])?;
    let mut plugged = Plugged::plug(setup, guest)?;

    let processes: Vec<_> = in_guest(setup.driver)
        .iter()
        .map(|act| guest.start(&["sh", "-c", &over_and_over(act, &mut random)], None))
        .collect::<Result<_>>()?;
    let start = Instant::now();
    while start.elapsed() < time {
        plugged = from_outside(setup, guest, plugged, &mut random, counts)?;
        guest.check_alive()?;
        thread::sleep(Duration::from_millis(random.u64(0..200)));
    }
    guest.run(&["touch", OVER])?;
    for process in processes {
        guest.output(&process, PATIENCE)?;
    }
    counts.guests += 1;

    load.verify(10)?;
    load.stop()?;
    plugged.unplug(guest)?;
    let plugged = Plugged::plug(setup, guest)?;
    // The driver may be loaded or not, and bound or not.
    guest.exec(&["rmmod", setup.driver.name()])?;
    guest.insmod(setup.driver, &[])?;
    guest.wait_balloon()?;
    for size in [Size::mib(300), Size::default()] {
        plugged.request(guest, size)?;
        guest.wait_until("a balloon of the requested size", PATIENCE, || {
            Ok(Size::pages(guest.vmstat("nr_balloon_pages")?) == size)
        })?;
    }
    guest.rmmod(setup.driver)?;
    plugged.unplug(guest)?;
    let now = guest.meminfo()?.total;
    ensure!(now == total, "the guest had {total}, and has {now}");
    check_free(guest, free)
}

/// The commands that processes in the guest repeat.
fn in_guest(driver: Driver) -> [String; 3] {
    let (directory, name, file) = (driver_directory(driver), driver.name(), driver.file());
    [
        format!(
            "cd {directory} && for device in virtio*; do echo $device >unbind; echo $device >bind; done"
        ),
        format!("rmmod {name}; insmod /modules/{file}"),
        "echo 1 >/proc/sys/vm/compact_memory".to_owned(),
    ]
}

/// A shell command that repeats `act`, with pauses in between, until the end. `act` may fail.
fn over_and_over(act: &str, random: &mut Rng) -> String {
    let pauses: Vec<_> = (0..50)
        .map(|_| format!("{:.3}", random.f64() * 2.0))
        .collect();
    let pauses = pauses.join(" ");
    format!(
        "while :; do for pause in {pauses}; do [ -e {OVER} ] && exit; ({act}) 2>/dev/null; sleep $pause; done; done"
    )
}

/// How often something was done.
#[derive(Default)]
struct Counts {
    /// The number of guests that completed.
    guests: u32,
    targets: u32,
    requests: u32,
    suspended: u32,
    awake: u32,
    plugged: u32,
}

impl Counts {
    fn describe(&self, each: Duration) -> String {
        format!(
            "{} times {} s, {} targets, {} requests, {} suspends and {} that the guest refused, {} devices",
            self.guests,
            each.as_secs(),
            self.targets,
            self.requests,
            self.suspended,
            self.awake,
            self.plugged
        )
    }
}

/// Does something random from outside the guest.
fn from_outside(
    setup: &Setup,
    guest: &Guest,
    plugged: Plugged,
    random: &mut Rng,
    counts: &mut Counts,
) -> Result<Plugged> {
    match random.u8(0..16) {
        0 => {
            plugged.unplug(guest)?;
            counts.plugged += 1;
            return Plugged::plug(setup, guest);
        }
        // Processes that are inside the driver may make the suspend fail.
        1 | 2 => match guest.suspend_devices() {
            Ok(()) => counts.suspended += 1,
            Err(_) => counts.awake += 1,
        },
        3..=6 => counts.requests += u32::from(plugged.ask(random)),
        _ => {
            let size = Size::pages(random.u64(0..Size::mib(500).as_pages()));
            // For a moment after plugging, QEMU does not know the balloon.
            counts.targets += u32::from(plugged.request(guest, size).is_ok());
        }
    }
    Ok(plugged)
}

/// The device that the guest has at the moment.
enum Plugged {
    Qemu,
    Extended(Daemon),
}

impl Plugged {
    fn plug(setup: &Setup, guest: &Guest) -> Result<Self> {
        if setup.device == Device::Extended {
            return Ok(Self::Extended(guest.plug_daemon()?));
        }
        let device = json!({ "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port0" });
        guest.qmp().execute::<Value>("device_add", &device)?;
        Ok(Self::Qemu)
    }

    fn unplug(self, guest: &Guest) -> Result<()> {
        match self {
            Self::Qemu => guest.unplug_balloon(),
            Self::Extended(daemon) => guest.unplug_daemon(daemon),
        }
    }

    /// Sets the target.
    fn request(&self, guest: &Guest, size: Size) -> Result<()> {
        match self {
            Self::Qemu => guest.balloon().request(size),
            Self::Extended(daemon) => {
                let bytes = size.as_bytes();
                daemon.call::<Value>(&Request::set(bytes))?;
                Ok(())
            }
        }
    }

    /// Makes a request, and does not wait for it. Returns whether the device could make it.
    fn ask(&self, random: &mut Rng) -> bool {
        let request = match random.u8(0..3) {
            0 => unused(4096 << random.u8(0..10)),
            1 => Request::Reclaim {
                block: 2 << 20,
                start: 0,
                end: 0,
            },
            _ => Request::DropCaches {
                pages: random.bool(),
                slab: true,
            },
        };
        match self {
            Self::Qemu => false,
            Self::Extended(daemon) => daemon.call::<Begun>(&request).is_ok(),
        }
    }
}

/// Fails if an access in the driver races with another access, and counts races elsewhere.
fn check_races(setup: &Setup, guest: &Guest) -> Result<()> {
    let faults = guest.console().faults(&[])?;
    let (ours, others): (Vec<_>, Vec<_>) = faults
        .iter()
        .filter(|fault| fault.starts_with(KCSAN))
        .partition(|fault| fault.contains(setup.driver.name()));
    setup.note(format!("{} races elsewhere in the kernel", others.len()));
    ensure!(ours.is_empty(), "accesses race with each other: {ours:?}");
    Ok(())
}
