// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's own balloon device, over a monitor that QEMU has for the manager alone (QMP).
//!
//! QEMU reports what the guest keeps, and not what it was asked for.
//!
//! The crate `qapi` fails at an event that it does not know, and a newer QEMU has more of them. So the few commands are
//! written here.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use balloon_policy::{Millis, Sample};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::balloon::{ANSWER, Balloon};
use crate::config::PAGE;
use crate::lines::Lines;
use crate::qemu_target::Target;

/// How often QEMU asks the guest for statistics, in seconds: the shortest interval that it has.
const INTERVAL: u64 = 1;

/// Where devices with and without a name are.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A statistic that the guest has not sent.
const MISSING: u64 = u64::MAX;

/// What is known from an earlier connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    /// QEMU's process.
    pub(crate) pid: Option<i32>,
    /// The target in bytes.
    pub(crate) target: u64,
    /// QEMU may not have received the target.
    pub(crate) is_open: bool,
}

/// A connection to a monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    lines: Lines,
    /// The balloon device.
    device: String,
    target: Target,
    /// The VM's memory without that of virtio-mem, in bytes. QEMU counts the balloon against it.
    ram: u64,
    /// The guest was reset a moment ago.
    was_reset: bool,
    /// While a guest boots whose driver has sent no statistics yet: the time of the last ones before, by QEMU's clock.
    boots: Option<u64>,
    stats: GuestStats,
    /// The time of the statistics that the manager has read last: by its own clock, and by QEMU's.
    taken: Millis,
    update: u64,
    /// When the manager has read statistics last.
    read: Millis,
}

/// The guest's statistics, as QEMU has them.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GuestStats {
    stats: BTreeMap<String, u64>,
    /// In seconds since 1970, or 0 if there are none.
    last_update: u64,
}

/// A message of QEMU's. An event has no value and no error.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Failure>,
    event: Option<String>,
    id: Value,
}

#[derive(Debug, Deserialize)]
struct Failure {
    desc: String,
}

impl Monitor {
    /// Connects, and has QEMU request statistics of the guest.
    ///
    /// # Errors
    ///
    /// Another program uses the monitor, or the VM has no balloon device.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let mut monitor = Self {
            lines: Lines::open(path).await?,
            device: String::new(),
            target: Target::default(),
            ram: 0,
            was_reset: false,
            boots: None,
            stats: GuestStats::default(),
            taken: 0,
            update: 0,
            read: 0,
        };
        monitor
            .execute::<Value>("qmp_capabilities", json!({}))
            .await?;
        monitor.device = monitor.find_device().await?;
        let arguments = json!({
            "path": monitor.device,
            "property": "guest-stats-polling-interval",
            "value": INTERVAL,
        });
        monitor.execute::<Value>("qom-set", arguments).await?;
        // A target can be set from now on.
        monitor.memory().await?;
        Ok(monitor)
    }

    /// Continues with the target of an earlier connection to this process, and sets it again if it is open.
    pub(crate) async fn resume(&mut self, past: Past) -> Result<()> {
        if past.pid != self.pid() {
            return Ok(());
        }
        self.target.set(past.target, Instant::now().into_std());
        if past.is_open {
            self.balloon().await?;
            self.set(past.target).await?;
        }
        Ok(())
    }

    async fn find_device(&mut self) -> Result<String> {
        #[derive(Deserialize)]
        struct Property {
            name: String,
            #[serde(rename = "type")]
            kind: String,
        }
        for place in DEVICES {
            let devices: Vec<Property> = self.execute("qom-list", json!({ "path": place })).await?;
            let balloon = devices
                .iter()
                .find(|device| device.kind.starts_with("child<virtio-balloon"));
            if let Some(device) = balloon {
                return Ok(format!("{place}/{}", device.name));
            }
        }
        bail!("the VM has no virtio-balloon device: add one, such as -device virtio-balloon-pci")
    }

    /// QEMU's process.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.lines.pid()
    }

    pub(crate) async fn balloon(&mut self) -> Result<Balloon> {
        #[derive(Deserialize)]
        struct Kept {
            actual: u64,
        }
        #[derive(Deserialize)]
        struct Status {
            running: bool,
        }
        let memory = self.memory().await?;
        let kept: Kept = self.execute("query-balloon", json!({})).await?;
        let status: Status = self.execute("query-status", json!({})).await?;
        let arguments = json!({ "path": self.device, "property": "guest-stats" });
        self.stats = self.execute("qom-get", arguments).await?;
        self.watch_reset();
        let size = self.ram.saturating_sub(kept.actual);
        let boots = self.boots.is_some();
        Ok(Balloon {
            memory: Some(memory),
            // The total that QEMU shows has the balloon in it or not, by what the driver has accepted.
            unusable: 0,
            connected: true,
            vmm: None,
            largest: self.ram,
            target: self.target.observe(size, Instant::now().into_std()),
            leased: false,
            claimed: false,
            notifies: false,
            lapsed: false,
            release: None,
            released: 0,
            size: if boots { 0 } else { size },
            resident: None,
            granule: PAGE,
            driver: self.stats.last_update > 0 && !boots,
            // A VM that does not run is paused.
            frozen: !status.running,
            stopped: None,
        })
    }

    /// The VM's memory in bytes, without NVDIMMs.
    async fn memory(&mut self) -> Result<u64> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Memory {
            base_memory: u64,
        }
        #[derive(Deserialize)]
        struct Device {
            #[serde(rename = "type")]
            kind: String,
            data: Value,
        }
        let memory: Memory = self.execute("query-memory-size-summary", json!({})).await?;
        let devices: Vec<Device> = self.execute("query-memory-devices", json!({})).await?;
        let sum = |kind| -> u64 {
            let devices = devices.iter().filter(|device| device.kind == kind);
            devices
                .filter_map(|device| device.data["size"].as_u64())
                .sum()
        };
        self.ram = memory.base_memory.saturating_add(sum("dimm"));
        Ok(self.ram.saturating_add(sum("virtio-mem")))
    }

    /// QEMU keeps the balloon's size and the statistics when the guest is reset.
    fn watch_reset(&mut self) {
        let update = self.stats.last_update;
        if std::mem::take(&mut self.was_reset) {
            self.boots = Some(update);
        }
        self.boots = self.boots.filter(|&old| old == update);
    }

    /// Sets a target in bytes. Returns why QEMU refuses it, if it does.
    pub(crate) async fn set(&mut self, bytes: u64) -> Result<Option<String>> {
        let kept = self.ram.saturating_sub(bytes);
        let reply = self.call("balloon", json!({ "value": kept })).await?;
        if reply.is_ok() {
            self.target.set(bytes, Instant::now().into_std());
        }
        Ok(reply.err())
    }

    /// The statistics that came with the state of the balloon, if the guest has sent any.
    pub(crate) fn sample(&mut self, epoch: Instant) -> Option<Sample> {
        let now = epoch.elapsed();
        let now = Millis::try_from(now.as_millis()).unwrap_or(Millis::MAX);
        let read = std::mem::replace(&mut self.read, now);
        if self.stats.last_update != self.update {
            self.update = self.stats.last_update;
            // QEMU counts in whole seconds: the statistics are at most that old.
            let update = UNIX_EPOCH.checked_add(Duration::from_secs(self.update));
            let age = update.and_then(|update| update.elapsed().ok());
            let age = age.unwrap_or_default().as_millis();
            let taken = now.saturating_sub(Millis::try_from(age).unwrap_or(Millis::MAX));
            // The host's clock may be wrong, but QEMU did not have them the last time, and has them now.
            self.taken = taken.clamp(read, now);
        }
        sample(&self.stats, self.taken)
    }

    /// Runs a command that QEMU does not refuse.
    async fn execute<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        match self.call(command, arguments).await? {
            Ok(value) => Ok(serde_json::from_value(value)?),
            Err(reason) => bail!("QEMU refuses {command}: {reason}"),
        }
    }

    /// Runs a command. Returns QEMU's value, or why QEMU refuses the command.
    async fn call(&mut self, command: &str, arguments: Value) -> Result<Result<Value, String>> {
        timeout(ANSWER, self.exchange(command, arguments))
            .await
            .with_context(|| format!("QEMU does not answer {command}: is its monitor in use?"))?
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Result<Value, String>> {
        let request = json!({ "execute": command, "arguments": arguments, "id": command });
        self.lines.send(&request).await?;
        loop {
            let message: Message = self.lines.receive().await?;
            self.was_reset |= message.event.as_deref() == Some("RESET");
            if let Some(Failure { desc }) = message.error {
                return Ok(Err(desc));
            }
            if let Some(value) = message.value.filter(|_| message.id == command) {
                return Ok(Ok(value));
            }
        }
    }
}

fn sample(stats: &GuestStats, taken: Millis) -> Option<Sample> {
    let value = |name: &str| {
        let value = stats.stats.get(name).copied();
        value.filter(|&value| value != MISSING)
    };
    let free = value("stat-free-memory").filter(|_| stats.last_update > 0)? / PAGE;
    let count = |name| value(name).unwrap_or(0);
    Some(Sample {
        taken,
        free,
        available: value("stat-available-memory").map_or(free, |bytes| bytes / PAGE),
        stalls: count("stat-alloc-stall"),
        swapped_in: count("stat-swap-in") / PAGE,
        kills: count("stat-oom-kill"),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::Mutex;
    use std::thread;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A VM with QEMU's monitor.
    #[derive(Clone)]
    struct Vm {
        actual: u64,
        update: u64,
        devices: Value,
        event: &'static str,
    }

    impl Vm {
        /// A VM of 64 MiB with an empty balloon.
        fn new() -> Self {
            Self {
                actual: 64 * MIB,
                update: 1,
                devices: json!([]),
                // Events come at any time.
                event: "NEW_IN_QEMU_99",
            }
        }
    }

    /// Plays the monitor of a VM for one client. Returns the sizes that the client has set, in bytes.
    fn monitor(listener: &UnixListener, vm: &Mutex<Vm>) -> Vec<u64> {
        let (mut stream, _) = listener.accept().unwrap();
        let mut kept = Vec::new();
        stream.write_all(b"{\"QMP\":{}}\n").unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let vm = vm.lock().unwrap().clone();
            let value = match request["execute"].as_str().unwrap() {
                "qom-list" => json!([{ "name": "b", "type": "child<virtio-balloon-pci>" }]),
                "qom-get" => json!({
                    "stats": { "stat-free-memory": PAGE },
                    "last-update": vm.update,
                }),
                "query-memory-size-summary" => json!({ "base-memory": 64 * MIB }),
                "query-memory-devices" => vm.devices,
                "query-balloon" => json!({ "actual": vm.actual }),
                "query-status" => json!({ "running": true }),
                "balloon" => {
                    kept.push(request["arguments"]["value"].as_u64().unwrap());
                    json!({})
                }
                _ => json!({}),
            };
            let reply = json!({ "return": value, "id": request["id"] });
            writeln!(stream, "{}\n{reply}", json!({ "event": vm.event })).unwrap();
        }
        kept
    }

    /// Connects to the monitor of a VM. Returns the sizes that the client has set, in bytes.
    fn connect<F: Future<Output = ()>>(
        vm: &Mutex<Vm>,
        client: impl FnOnce(Monitor) -> F,
    ) -> Vec<u64> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            let qemu = scope.spawn(|| monitor(&listener, vm));
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                client(Monitor::open(&path).await.unwrap()).await;
            });
            qemu.join().unwrap()
        })
    }

    #[test]
    fn a_new_connection_knows_the_target_and_sets_an_open_one_again() {
        let own = Some(std::process::id().try_into().unwrap());
        for (pid, is_open, target, set) in [
            (own, true, 16 * MIB, &[48 * MIB][..]),
            // Another program may have set the target since.
            (own, false, 16 * MIB, &[]),
            // The guest of another process may still boot.
            (Some(1), true, 0, &[]),
            (None, true, 0, &[]),
        ] {
            let past = Past {
                pid,
                target: 16 * MIB,
                is_open,
            };
            let kept = connect(&Mutex::new(Vm::new()), |mut monitor| async move {
                monitor.resume(past).await.unwrap();
                let balloon = monitor.balloon().await.unwrap();
                assert_eq!((balloon.target, balloon.size), (target, 0));
                assert!(balloon.driver && !balloon.frozen);
            });
            assert_eq!(kept, set);
        }
    }

    #[test]
    fn the_first_command_of_a_connection_may_set_a_target() {
        let kept = connect(&Mutex::new(Vm::new()), |mut monitor| async move {
            monitor.set(16 * MIB).await.unwrap();
        });
        assert_eq!(kept, [48 * MIB]);
    }

    #[test]
    fn a_guest_that_was_reset_has_no_balloon_until_its_driver_sends_statistics() {
        let vm = &Mutex::new(Vm {
            actual: 48 * MIB,
            ..Vm::new()
        });
        connect(vm, |mut monitor| async move {
            for (update, event, driver, size) in [
                (1, "RTC_CHANGE", true, 16 * MIB),
                // The guest has sent these before the reset.
                (2, "RESET", false, 0),
                (2, "RTC_CHANGE", false, 0),
                (3, "RTC_CHANGE", true, 16 * MIB),
            ] {
                {
                    let mut vm = vm.lock().unwrap();
                    (vm.update, vm.event) = (update, event);
                }
                let balloon = monitor.balloon().await.unwrap();
                assert_eq!((balloon.driver, balloon.size), (driver, size), "{update}");
            }
        });
    }

    /// Also if the clock was set back.
    #[test]
    fn statistics_have_the_same_time_each_time_they_are_read() {
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs();
        for update in [now - 1, u64::from(u32::MAX)] {
            let vm = Mutex::new(Vm {
                update,
                ..Vm::new()
            });
            connect(&vm, |mut monitor| async move {
                let epoch = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
                monitor.balloon().await.unwrap();
                let first = monitor.sample(epoch).unwrap();
                for pause in 0..100 {
                    thread::sleep(Duration::from_micros(30 * pause));
                    assert_eq!(monitor.sample(epoch), Some(first));
                }
            });
        }
    }

    #[test]
    fn memory_of_virtio_mem_is_not_in_the_balloon() {
        let device = |kind, size| json!({ "type": kind, "data": { "size": size } });
        let vm = Mutex::new(Vm {
            actual: 96 * MIB,
            devices: json!([
                device("dimm", 32 * MIB),
                device("virtio-mem", 128 * MIB),
                device("nvdimm", 512 * MIB),
            ]),
            ..Vm::new()
        });
        let kept = connect(&vm, |mut monitor| async move {
            let balloon = monitor.balloon().await.unwrap();
            assert_eq!((balloon.memory, balloon.size), (Some(224 * MIB), 0));
            assert_eq!((balloon.largest, balloon.target), (96 * MIB, 0));
            monitor.set(16 * MIB).await.unwrap();
        });
        assert_eq!(kept, [80 * MIB]);
    }

    #[test]
    fn missing_statistics_are_left_out() {
        let stats = |last_update| GuestStats {
            stats: BTreeMap::from([
                ("stat-free-memory".to_owned(), 3 * PAGE),
                ("stat-available-memory".to_owned(), MISSING),
                ("stat-oom-kill".to_owned(), 7),
            ]),
            last_update,
        };
        let expected = Sample {
            taken: 5,
            free: 3,
            available: 3,
            stalls: 0,
            swapped_in: 0,
            kills: 7,
        };
        assert_eq!(sample(&stats(1), 5), Some(expected));
        assert_eq!(sample(&stats(0), 5), None);
    }
}
