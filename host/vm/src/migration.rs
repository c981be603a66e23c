// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration of a guest to another QEMU, or to /dev/null for a measurement.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::home::Home;
use crate::qmp::Qmp;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

/// QEMU's value for no limit of the bandwidth.
const UNLIMITED: Size = Size::bytes(0);

/// How long a guest may be stopped at the end, in milliseconds: QEMU's default.
const DOWNTIME: u64 = 300;

/// The same for a guest that writes faster than QEMU copies.
const LONG_DOWNTIME: u64 = 60_000;

/// The polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The costs of a migration, as QEMU counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// From its begin to its end.
    pub total: Duration,
    /// For how long the guest was stopped.
    pub downtime: Duration,
    /// What was sent.
    pub sent: Size,
    /// The amount that QEMU still has to send.
    pub remaining: Size,
    /// How often QEMU collected dirty pages: once at first, and once more whenever it had sent all
    /// of them.
    pub rounds: u64,
}

/// An active migration to another QEMU. When it is dropped, the guest stays in its QEMU.
#[derive(Debug)]
pub struct Migration<'a> {
    guest: &'a Guest,
    destination: Option<Home>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MigrationInfo {
    #[serde(default)]
    status: String,
    #[serde(default)]
    total_time: u64,
    #[serde(default)]
    downtime: u64,
    #[serde(default)]
    ram: Ram,
    error_desc: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Ram {
    transferred: u64,
    remaining: u64,
    dirty_sync_count: u64,
}

impl MigrationInfo {
    fn query(qmp: &Qmp) -> Result<Self> {
        qmp.execute("query-migrate", &json!({}))
    }

    fn transfer(&self) -> Transfer {
        Transfer {
            total: Duration::from_millis(self.total_time),
            downtime: Duration::from_millis(self.downtime),
            sent: Size::bytes(self.ram.transferred),
            remaining: Size::bytes(self.ram.remaining),
            rounds: self.ram.dirty_sync_count,
        }
    }
}

impl Guest {
    /// Begins to migrate the guest to another QEMU, with at most `bandwidth` in a second. However slow the guest is, the
    /// migration does not end before [`Migration::finish`].
    pub fn migrate(&self, bandwidth: Size) -> Result<Migration<'_>> {
        let config = self.config().clone().argument("-incoming", "defer");
        let home = self.home();
        let destination = Home::start(&config, |stream| home.agent.by_way_of(stream))?;
        let address = address();
        destination
            .qmp
            .execute::<Value>("migrate-incoming", &address)?;
        set(&home.qmp, &json!({ "downtime-limit": 0 }))?;
        start(&home.qmp, bandwidth, &address)?;
        // Before the first round, QEMU does not know how much it has to send.
        self.wait_until("the begin of a migration", PATIENCE, || {
            Ok(MigrationInfo::query(&home.qmp)?.transfer().rounds > 0)
        })?;
        Ok(Migration {
            guest: self,
            destination: Some(destination),
        })
    }

    /// Migrates the running guest to /dev/null, and resumes it.
    pub fn migrate_to_nowhere(&self) -> Result<Transfer> {
        let qmp = self.qmp();
        start(&qmp, UNLIMITED, &json!({ "uri": "exec:cat >/dev/null" }))?;
        let transfer = self.wait_migrated(&qmp, |_| Ok(()))?;
        qmp.execute::<Value>("cont", &json!({}))?;
        Ok(transfer)
    }

    /// Waits for the end of a migration, and passes intermediate costs to `watch`.
    pub(crate) fn wait_migrated(
        &self,
        qmp: &Qmp,
        mut watch: impl FnMut(&Transfer) -> Result<()>,
    ) -> Result<Transfer> {
        let (mut last, mut stopwatch) = (None, self.stopwatch());
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            let info = MigrationInfo::query(qmp)?;
            let transfer = info.transfer();
            match info.status.as_str() {
                "completed" => return Ok(transfer),
                "failed" | "cancelled" => bail!(
                    "the migration has {}: {}",
                    info.status,
                    info.error_desc.as_deref().unwrap_or("no reason is given")
                ),
                _ => watch(&transfer)?,
            }
            self.check_alive()?;
            if last != Some(transfer) {
                last = Some(transfer);
                stopwatch.restart();
            } else {
                ensure!(
                    !is_over,
                    "the migration makes no progress for {} s ({stopwatch}): {transfer:?}",
                    PATIENCE.as_secs()
                );
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Migration<'_> {
    /// Its costs so far.
    ///
    /// # Errors
    ///
    /// It is over.
    pub fn progress(&self) -> Result<Transfer> {
        let info = MigrationInfo::query(&self.guest.qmp())?;
        ensure!(
            info.status == "active",
            "the migration is {} already",
            info.status
        );
        Ok(info.transfer())
    }

    /// Lifts the limit of the bandwidth, waits for the end, and makes the other QEMU the current one. A
    /// guest that writes faster than QEMU copies is stopped after the first round.
    ///
    /// # Errors
    ///
    /// QEMU emulates the processors of a guest with several NUMA nodes: up to 11.1 it then loses some of what the guest
    /// writes while it migrates, except to the memory of the first node.
    pub fn finish(mut self) -> Result<Transfer> {
        ensure!(
            self.guest.config().migrates(),
            "QEMU loses writes of a migrating guest that has several nodes and no KVM; use one node, or cancel the migration"
        );
        let qmp = self.guest.qmp();
        set(
            &qmp,
            &json!({ "max-bandwidth": UNLIMITED.as_bytes(), "downtime-limit": DOWNTIME }),
        )?;
        let mut hurried = false;
        let transfer = self.guest.wait_migrated(&qmp, |transfer| {
            if transfer.rounds > 1 && !hurried {
                set(&qmp, &json!({ "downtime-limit": LONG_DOWNTIME }))?;
                hurried = true;
            }
            Ok(())
        })?;
        let destination = self.destination.take().context("it is taken here only")?;
        destination
            .qmp
            .wait_event(0, PATIENCE, |event| event.name == "RESUME")
            .context("the guest does not resume in the other QEMU")?;
        self.guest.moved(destination);
        Ok(transfer)
    }

    /// Cancels it. The guest stays in its QEMU.
    pub fn cancel(self) -> Result<()> {
        self.progress()?;
        let qmp = self.guest.qmp();
        qmp.execute::<Value>("migrate_cancel", &json!({}))?;
        self.guest
            .wait_until("a cancelled migration", PATIENCE, || {
                Ok(MigrationInfo::query(&qmp)?.status == "cancelled")
            })
    }
}

/// Makes a QEMU begin to migrate its guest.
fn start(qmp: &Qmp, bandwidth: Size, address: &Value) -> Result<()> {
    set(qmp, &json!({ "max-bandwidth": bandwidth.as_bytes() }))?;
    qmp.execute::<Value>("migrate", address)?;
    Ok(())
}

/// Sets parameters of the migration.
fn set(qmp: &Qmp, parameters: &Value) -> Result<()> {
    qmp.execute::<Value>("migrate-set-parameters", parameters)?;
    Ok(())
}

/// The socket on which a QEMU waits for a guest: an abstract name, which needs no cleanup.
fn address() -> Value {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = format!("virtio-balloon-rs-{}-{number}", process::id());
    json!({ "channels": [{
        "channel-type": "main",
        "addr": { "transport": "socket", "type": "unix", "path": path, "abstract": true },
    }] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_understood() {
        let parse = |text| serde_json::from_str::<MigrationInfo>(text).unwrap();
        assert_eq!(parse("{}").transfer().rounds, 0);
        assert_eq!(parse(r#"{"status": "setup"}"#).status, "setup");
        let info = parse(
            r#"{"status": "completed", "total-time": 1500, "downtime": 20, "setup-time": 3,
                "ram": {"transferred": 4096, "remaining": 0, "dirty-sync-count": 2, "total": 8192}}"#,
        );
        let transfer = info.transfer();
        assert_eq!(transfer.total, Duration::from_millis(1500));
        assert_eq!(transfer.sent, Size::kib(4));
        assert_eq!(transfer.rounds, 2);
    }
}
