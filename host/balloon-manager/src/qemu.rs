// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's own balloon device, over a monitor that QEMU has for the manager alone (QMP).
//!
//! QEMU reports what the guest keeps, and not what it was asked for: the target is what the manager has set last. When
//! another program sets a larger one, the balloon outgrows that target, which shows.
//!
//! The protocol has a line of JSON for each message. Crates for it refuse events that they do not know, and a newer QEMU
//! has more of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use balloon_policy::{Millis, Sample};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use crate::balloon::{ANSWER, Balloon};
use crate::config::PAGE;

/// The longest message.
const MAX_MESSAGE: u64 = 1 << 20;

/// How often QEMU asks the guest for statistics, in seconds: the shortest interval that it has.
const INTERVAL: u64 = 1;

/// A balloon that grows beyond its target by more than this has another target.
const SLACK: u64 = 4 << 20;

/// Where devices with and without a name are.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A statistic that the guest has not sent.
const MISSING: u64 = u64::MAX;

/// A connection to a monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
    /// The balloon device.
    device: String,
    /// The target that was set, in bytes.
    target: Option<u64>,
    /// The VM's memory in bytes.
    memory: u64,
    /// The balloon's size in bytes, when it was read last.
    size: u64,
    /// The newest statistics by QEMU's clock, and a time at which QEMU did not have them yet.
    update: u64,
    earliest: Millis,
    /// When the manager has read statistics last.
    read: Millis,
}

/// What QEMU says of statistics.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GuestStats {
    stats: BTreeMap<String, u64>,
    /// In seconds since 1970, or 0 if there are none.
    last_update: u64,
}

/// A message of QEMU's. Events have neither of these.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Failure>,
    id: Value,
}

#[derive(Debug, Deserialize)]
struct Failure {
    desc: String,
}

impl Monitor {
    /// Connects, and has QEMU ask the guest for statistics.
    ///
    /// # Errors
    ///
    /// Another program uses the monitor, or the VM has no balloon device.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let stream = timeout(ANSWER, UnixStream::connect(path))
            .await?
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let mut monitor = Self {
            stream: BufReader::new(stream),
            device: String::new(),
            target: None,
            memory: 0,
            size: 0,
            update: 0,
            earliest: 0,
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
        Ok(monitor)
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
        self.stream.get_ref().peer_cred().ok()?.pid()
    }

    pub(crate) async fn balloon(&mut self) -> Result<Balloon> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Memory {
            base_memory: u64,
            #[serde(default)]
            plugged_memory: u64,
        }
        #[derive(Deserialize)]
        struct Kept {
            actual: u64,
        }
        #[derive(Deserialize)]
        struct Status {
            running: bool,
        }
        let memory: Memory = self.execute("query-memory-size-summary", json!({})).await?;
        self.memory = memory.base_memory + memory.plugged_memory;
        let kept: Kept = self.execute("query-balloon", json!({})).await?;
        let status: Status = self.execute("query-status", json!({})).await?;
        let stats = self.statistics().await?;
        let size = self.memory.saturating_sub(kept.actual);
        let outgrows = |target| size > target + SLACK && size > self.size;
        let target = self.target.filter(|&target| !outgrows(target));
        (self.target, self.size) = (target, size);
        Ok(Balloon {
            memory: Some(self.memory),
            connected: true,
            largest: u64::MAX,
            target: target.unwrap_or(size),
            size,
            granule: PAGE,
            driver: stats.last_update > 0,
            // A VM that does not run is paused, or migrates.
            frozen: !status.running,
            stopped: None,
        })
    }

    /// Sets a target in bytes. Returns why QEMU refuses it, if it does.
    pub(crate) async fn set(&mut self, bytes: u64) -> Result<Option<String>> {
        let kept = self.memory.saturating_sub(bytes);
        let reply = self.call("balloon", json!({ "value": kept })).await?;
        if reply.is_ok() {
            self.target = Some(bytes);
        }
        Ok(reply.err())
    }

    /// The newest statistics, if the guest has sent any.
    pub(crate) async fn sample(&mut self, epoch: Instant) -> Result<Option<Sample>> {
        let stats = self.statistics().await?;
        let now = Millis::try_from(epoch.elapsed().as_millis())?;
        if stats.last_update != self.update {
            self.update = stats.last_update;
            self.earliest = self.read;
        }
        self.read = now;
        // QEMU counts in whole seconds: the statistics are at most that old.
        let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let age = clock.saturating_sub(u128::from(stats.last_update) * 1_000);
        let taken = now.saturating_sub(Millis::try_from(age)?);
        Ok(sample(&stats, taken.max(self.earliest)))
    }

    async fn statistics(&mut self) -> Result<GuestStats> {
        let arguments = json!({ "path": self.device, "property": "guest-stats" });
        self.execute("qom-get", arguments).await
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
        let line = format!("{request}\n");
        self.stream.get_mut().write_all(line.as_bytes()).await?;
        loop {
            let mut line = Vec::new();
            let mut limited = (&mut self.stream).take(MAX_MESSAGE);
            limited.read_until(b'\n', &mut line).await?;
            if line.last() != Some(&b'\n') {
                bail!("QEMU has closed its monitor");
            }
            let message: Message = serde_json::from_slice(&line)?;
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
    use super::*;

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
