// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processes of the balloon device are killed, and the guest continues without the device.

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balloon_control::{HintAction, Request};
use fastrand::Rng;
use serde_json::Value;
use vm::{Config, Daemon, Device, Driver, Guest, Load, MemoryBackend, Offer, RunningLoad, Size};

use crate::lifecycle::{device, driver_directory};
use crate::reporting::FAST_REPORTS;
use crate::scenario::{BOTH_DRIVERS, PATIENCE, Scenario, Setup, TEST_KERNEL, VHOST_USER_DEVICE};
use crate::sizes::{check_free, check_size};
use crate::vhost_user::{wait_driver, wait_restarted};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "daemon_killed",
        proves: "a guest keeps running when the processes of its balloon device are killed, in any state, and gets all of its memory back",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: daemon_killed,
    },
    Scenario {
        name: "random_kills",
        proves: "the same at 200 random moments, while the guest's data stay intact",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: random_kills,
    },
    Scenario {
        name: "service_kills",
        proves: "a guest keeps its balloon when the device's service is killed at 200 random moments and starts again",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: service_kills,
    },
];

/// The seeds of what is random.
const SEEDS: Range<u64> = 0..200;

/// How many times a guest that keeps such a device verifies its data.
const ROUNDS_ALONE: u64 = 10;

/// The size of the balloon, or its target.
const SIZE: Size = Size::mib(400);

const OUT_OF_REACH: &str = "out of reach";

/// A state of a guest and its device: its name, and the function that establishes it.
type State = (&'static str, fn(&Guest, &Daemon) -> Result<()>);

/// A way to stop using a device: its name, and the function.
type Way = (&'static str, fn(&Setup, &Guest) -> Result<()>);

/// The states in which the device's processes are killed. The last ones are for devices with the extended protocol.
const STATES: [State; 10] = [
    ("empty", |_, _| Ok(())),
    ("idle", |guest, daemon| reach(guest, daemon, SIZE)),
    ("inflating", |guest, daemon| {
        start(guest, daemon, SIZE, "balloon_inflate")
    }),
    ("deflating", |guest, daemon| {
        reach(guest, daemon, SIZE)?;
        start(guest, daemon, Size::default(), "balloon_deflate")
    }),
    (OUT_OF_REACH, |guest, daemon| {
        set(daemon, guest.meminfo()?.total - Size::mib(1))?;
        guest.wait_until("a balloon that has grown", PATIENCE, || {
            let size = Size::bytes(daemon.info()?.size);
            Ok(size > SIZE && balloon(guest)? == size)
        })
    }),
    ("hints", |guest, daemon| {
        daemon.call::<Value>(&Request::Hints {
            action: HintAction::Start,
        })?;
        guest.wait_until("hints", PATIENCE, || Ok(daemon.info()?.counters.hinted > 0))
    }),
    ("report", |guest, _| {
        // The guest reports memory that is freed from now on.
        guest.load(Load::Touch { mib: 200 })?.wait()?;
        Ok(())
    }),
    ("statistics", |_, daemon| {
        daemon.call::<Value>(&Request::SetStatsInterval { seconds: 1 })?;
        Ok(())
    }),
    ("request", |_, daemon| {
        daemon.call::<Value>(&Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        })?;
        Ok(())
    }),
    ("unused pages", |_, daemon| {
        daemon.call::<Value>(&Request::Unused {
            block: 4 << 10,
            start: 0,
            end: 0,
        })?;
        Ok(())
    }),
];

/// The number of states for the extended protocol.
const EXTENDED: usize = 2;

const INFLATING: usize = 2;

/// The states for a device.
fn states(setup: &Setup) -> &'static [State] {
    match (setup.device, setup.driver) {
        (Device::Extended, Driver::Rust) => &STATES,
        _ => &STATES[..STATES.len() - EXTENDED],
    }
}

/// The ways to stop using a device whose processes are gone. The last one is for devices that have not used a buffer:
/// QEMU aborts if the driver restarts such a device, so the driver has to know that the device does not respond.
const WAYS: [Way; 4] = [
    ("unplug", |_, _| Ok(())),
    ("unbind", |setup, guest| {
        let device = device(guest, setup.driver)?;
        let file = format!("{}/unbind", driver_directory(setup.driver));
        guest.write_file(&file, &device)
    }),
    ("rmmod", |setup, guest| guest.rmmod(setup.driver)),
    ("suspend and resume", |_, guest| guest.suspend_devices()),
];

const SUSPEND: usize = 3;

fn set(daemon: &Daemon, size: Size) -> Result<()> {
    daemon.call::<Value>(&Request::set(size.as_bytes()))?;
    Ok(())
}

/// Sets the target `size` and waits until this counter shows that the driver has begun. QEMU aborts if the driver
/// reads the target of a device that is gone.
fn start(guest: &Guest, daemon: &Daemon, size: Size, counter: &str) -> Result<()> {
    let before = guest.vmstat(counter)?;
    set(daemon, size)?;
    guest.wait_until("an inflating or deflating balloon", PATIENCE, || {
        Ok(guest.vmstat(counter)? > before)
    })
}

fn balloon(guest: &Guest) -> Result<Size> {
    Ok(guest.page_size() * guest.vmstat("nr_balloon_pages")?)
}

fn reach(guest: &Guest, daemon: &Daemon, size: Size) -> Result<()> {
    set(daemon, size)?;
    guest.wait_until("a balloon of its target size", PATIENCE, || {
        Ok(balloon(guest)? == size && daemon.info()?.size == size.as_bytes())
    })
}

/// A guest whose devices offer the features that the states need.
fn config(setup: &Setup) -> Config {
    setup
        .config()
        .parameter(FAST_REPORTS)
        .offer(&[Offer::FreePageHint, Offer::FreePageReporting])
}

/// A guest that gets devices while it runs.
fn hotplug_config(setup: &Setup) -> Config {
    config(setup)
        .backend(MemoryBackend::Memfd)
        .hotplug_port()
        .balloon(None)
        .reboots()
}

/// Establishes a state, after which the device is killed with this delay.
fn begin(
    guest: &Guest,
    daemon: &Daemon,
    (name, begin): State,
    delay: Option<Duration>,
) -> Result<()> {
    guest.write_file("/dev/kmsg", &format!("{name}, killed after {delay:?}"))?;
    begin(guest, daemon)
}

/// Waits until the driver has collected the used buffers of a device that has stopped.
fn wait_collected(guest: &Guest) -> Result<()> {
    /// The driver acts on a used buffer within 100 ms. The guest itself waits, since its clock is the driver's. The C
    /// driver has no files.
    const COUNTERS: &str = "sleep 0.5; grep balloon /proc/vmstat
        cd /sys/kernel/debug && cat virtio_balloon_rs-virtio*/balloon virtio_balloon_rs-virtio*/queues 2>/dev/null || true";
    let mut last = guest.sh(COUNTERS)?;
    guest.wait_until("a driver with all used buffers", PATIENCE, || {
        let now = guest.sh(COUNTERS)?;
        let is_same = now == last;
        last = now;
        Ok(is_same)
    })
}

/// Plugs a device, and kills its processes so long after the start of a state. Without a time the device stops first,
/// and the driver collects the used buffers: QEMU would abort if any driver accessed the configuration space at that
/// moment.
fn lose(setup: &Setup, guest: &Guest, state: usize, delay: Option<Duration>) -> Result<()> {
    let daemon = guest.plug_daemon()?;
    guest.wait_balloon()?;
    // The driver has made its first report.
    for size in [Size::mib(1), Size::default()] {
        reach(guest, &daemon, size)?;
    }
    begin(guest, &daemon, states(setup)[state], delay)?;
    match delay {
        Some(delay) => thread::sleep(delay),
        None => {
            daemon.stop_worker()?;
            wait_collected(guest)?;
        }
    }
    daemon.kill()
}

/// Stops using a device whose processes are gone, and checks that the guest has all of its memory.
fn leave(setup: &Setup, guest: &Guest, way: usize, total: Size, free: Size) -> Result<Duration> {
    let (_, leave) = WAYS[way];
    let start = guest.stopwatch();
    leave(setup, guest)?;
    guest.unplug_balloon()?;
    let took = start.elapsed();
    guest.disconnect("balloon")?;
    if !guest.is_loaded(setup.driver)? {
        guest.insmod(setup.driver, &[])?;
    }
    let pages = guest.vmstat("nr_balloon_pages")?;
    ensure!(pages == 0, "{pages} pages went with the device");
    let now = guest.meminfo()?.total;
    ensure!(now == total, "the guest had {total}, and has {now}");
    guest.wait_until("free memory as before", PATIENCE, || {
        Ok(guest.free()? + Size::mib(64) > free)
    })?;
    Ok(took)
}

/// Boots a guest with the driver and with data in memory.
fn with_data<T>(
    setup: &Setup,
    config: &Config,
    body: impl FnOnce(&Guest, &RunningLoad<'_>, Size, Size) -> Result<T>,
) -> Result<T> {
    let live = |guest: &Guest| {
        let before = guest.free()?;
        guest.insmod(setup.driver, &[])?;
        let load = guest.load(Load::Hold {
            mib: 96,
            threads: 1,
        })?;
        let value = body(guest, &load, guest.meminfo()?.total, guest.free()?)?;
        load.verify(1)?;
        load.stop()?;
        if leaves(setup) {
            check_free(guest, before)?;
        }
        Ok(value)
    };
    if leaves(setup) {
        vm::run(config, live)
    } else {
        vm::run_and_kill(config, live)
    }
}

/// Whether the driver can be unbound from a device whose processes are gone. With the C driver unbind does not end, and
/// the guest does not power off either.
fn leaves(setup: &Setup) -> bool {
    setup.driver != Driver::C
}

fn daemon_killed(setup: &Setup) -> Result<()> {
    if let Some(time) = setup.time() {
        return all_at_once(setup, time);
    }
    if !leaves(setup) {
        return each_alone(setup);
    }
    let config = hotplug_config(setup);
    with_data(setup, &config, |guest, load, total, free| {
        let mut longest = Duration::ZERO;
        for state in 0..states(setup).len() {
            let (name, _) = states(setup)[state];
            let way = match name {
                "idle" => SUSPEND,
                _ => state % SUSPEND,
            };
            let what = || format!("killed while {name}, {}", WAYS[way].0);
            lose(setup, guest, state, None).with_context(what)?;
            load.verify(2).with_context(what)?;
            longest = longest.max(leave(setup, guest, way, total, free).with_context(what)?);
        }
        setup.note(format!(
            "{:.1} s at most to stop using a device",
            longest.as_secs_f64()
        ));
        Ok(())
    })?;
    // The guest reboots with such a device, and powers off.
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        lose(setup, guest, INFLATING, None)?;
        guest.reboot()
    })
}

/// Kills the device of a guest in each state, and reports which guests keep running.
fn each_alone(setup: &Setup) -> Result<()> {
    for (state, (name, _)) in states(setup).iter().enumerate() {
        let result = with_data(setup, &hotplug_config(setup), |guest, load, _, _| {
            lose(setup, guest, state, None)?;
            load.verify(ROUNDS_ALONE)
        });
        setup.tolerate(result.with_context(|| format!("killed while {name}")))?;
    }
    Ok(())
}

/// Kills the device of one guest for each state, all at the same time, and verifies the guests' data for `time`.
fn all_at_once(setup: &Setup, time: Duration) -> Result<()> {
    /// The loads verify their memory all the time. Calls of the guests' agents would slow them down.
    const INTERVAL: Duration = Duration::from_secs(10);
    let live = |state: usize| {
        let (name, _) = states(setup)[state];
        let suffix = format!("-{}", name.replace(' ', "-"));
        let config = hotplug_config(setup).name_suffix(&suffix);
        let passes = with_data(setup, &config, |guest, load, total, free| {
            lose(setup, guest, state, None)?;
            let before = load.status()?.progress.passes;
            let start = Instant::now();
            while start.elapsed() < time {
                thread::sleep(INTERVAL.min(time));
                load.verify(1)?;
            }
            let passes = load.status()?.progress.passes - before;
            if leaves(setup) {
                leave(setup, guest, state % SUSPEND, total, free)?;
            }
            Ok(passes)
        });
        passes.with_context(|| format!("killed while {name}"))
    };
    let results: Vec<_> = thread::scope(|scope| {
        let guests: Vec<_> = (0..states(setup).len())
            .map(|state| scope.spawn(move || live(state)))
            .collect();
        let join = |guest: ScopedJoinHandle<'_, _>| guest.join().expect("a guest's thread");
        guests.into_iter().map(join).collect()
    });
    for (result, (name, _)) in results.into_iter().zip(states(setup)) {
        let note =
            |passes| setup.note(format!("killed while {name}: data verified {passes} times"));
        setup.tolerate(result.map(note))?;
    }
    Ok(())
}

/// QEMU's last line, which says why it has ended.
fn qemu_error(setup: &Setup) -> Result<String> {
    let log = fs::read_to_string(setup.logs().join("qemu.log"))?;
    Ok(log.lines().last().unwrap_or_default().to_owned())
}

fn random_kills(setup: &Setup) -> Result<()> {
    /// How many times one guest loses its device at most: the test reads the guest's log
    /// repeatedly.
    const PER_GUEST: usize = 50;
    let per_guest = if leaves(setup) { PER_GUEST } else { 1 };
    let mut seeds = setup.seeds().unwrap_or(SEEDS).peekable();
    let (mut killed, mut lost, mut verified) = (0, Vec::new(), 0);
    while seeds.peek().is_some() {
        let (mut last, mut is_lost) = (0, false);
        let result = with_data(setup, &hotplug_config(setup), |guest, load, total, free| {
            for seed in seeds.by_ref().take(per_guest) {
                last = seed;
                killed += 1;
                random_kill(setup, guest, load, seed, (total, free))
                    .inspect_err(|_| is_lost = guest.is_lost())?;
            }
            verified += load.status()?.progress.passes;
            Ok(())
        });
        match result {
            // The next guest overwrites QEMU's log.
            Err(error) if is_lost => lost.push(format!("{error:#}; {}", qemu_error(setup)?)),
            result => setup.tolerate(result.with_context(|| format!("seed {last}")))?,
        }
    }
    let vms = lost.len();
    setup.note(format!(
        "{killed} times killed, {vms} VMs lost, data verified {verified} times"
    ));
    lost.iter().for_each(|error| setup.note(error.clone()));
    let result = (|| {
        ensure!(lost.is_empty(), "QEMU did not live on {vms} times");
        Ok(())
    })();
    setup.tolerate(result)
}

/// Kills the device of a guest with so much total and free memory. The seed determines the state, the time, and the
/// way to stop using the device.
fn random_kill(
    setup: &Setup,
    guest: &Guest,
    load: &RunningLoad<'_>,
    seed: u64,
    (total, free): (Size, Size),
) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let state = rng.usize(..states(setup).len());
    let delay = Duration::from_micros(rng.u64(..300_000));
    let way = rng.usize(..SUSPEND);
    let lose = || -> Result<()> {
        lose(setup, guest, state, Some(delay))?;
        if !leaves(setup) {
            return load.verify(ROUNDS_ALONE);
        }
        load.verify(2)?;
        leave(setup, guest, way, total, free).map(drop)
    };
    lose().with_context(|| {
        let (name, _) = states(setup)[state];
        format!("seed {seed}: killed {delay:?} after {name}")
    })
}

fn service_kills(setup: &Setup) -> Result<()> {
    let config = config(setup);
    let daemon = Arc::new(config.start_daemon_service()?);
    vm::run(&config.daemon(&daemon), |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        let load = guest.load(Load::Hold {
            mib: 96,
            threads: 1,
        })?;
        let mut killed = 0;
        for seed in setup.seeds().unwrap_or(SEEDS) {
            service_kill(setup, guest, &daemon, seed)?;
            load.verify(1).with_context(|| format!("seed {seed}"))?;
            killed += 1;
        }
        for size in [SIZE, Size::default()] {
            reach(guest, &daemon, size)?;
            check_size(guest, size)?;
        }
        let verified = load.stop()?.progress.passes;
        setup.note(format!(
            "{killed} times killed and started again, data verified {verified} times"
        ));
        guest.rmmod(setup.driver)
    })?;
    daemon.end()
}

/// Kills the device's service in a state and after a delay that come from this seed, and starts it again.
fn service_kill(setup: &Setup, guest: &Guest, daemon: &Daemon, seed: u64) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    // With a target out of reach a guest with the C driver runs out of memory.
    let states: Vec<_> = states(setup)
        .iter()
        .filter(|(name, _)| setup.driver != Driver::C || *name != OUT_OF_REACH)
        .collect();
    let state = *states[rng.usize(..states.len())];
    let delay = Duration::from_micros(rng.u64(..300_000));
    let kill = || -> Result<()> {
        reach(guest, daemon, Size::default())?;
        let before = daemon.processes()?;
        begin(guest, daemon, state, Some(delay))?;
        thread::sleep(delay);
        daemon.kill_and_restart()?;
        wait_restarted(guest, before)
    };
    kill().with_context(|| format!("seed {seed}: killed {delay:?} after {}", state.0))
}
