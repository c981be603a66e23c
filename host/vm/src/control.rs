// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the host controls a balloon device: by a daemon's control socket, or by QEMU's machine protocol.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use balloon_control::{Request, Stats};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::qmp::Qmp;
use crate::size::Size;

/// The guest's statistics, as the host has received them.
#[derive(Clone, Debug)]
pub struct Sample {
    values: BTreeMap<String, u64>,
    /// When it came, in seconds since 1970.
    pub taken: u64,
}

impl Sample {
    /// All values with their names, such as `free-memory`.
    pub fn values(&self) -> impl Iterator<Item = (&str, u64)> {
        self.values
            .iter()
            .map(|(name, &value)| (name.as_str(), value))
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.values
            .get(name)
            .copied()
            .with_context(|| format!("the host knows no {name}"))
    }
}

/// How the host controls a balloon device.
pub(crate) trait Control {
    /// The size of the balloon.
    fn size(&self) -> Result<Size>;

    /// Sets the target `size`.
    fn request(&self, size: Size) -> Result<()>;

    /// Requests statistics from the guest every so many seconds.
    fn poll_statistics(&self, seconds: u32) -> Result<()>;

    /// The latest statistics, if the guest has sent any.
    fn statistics(&self) -> Result<Option<Sample>>;

    /// The polling interval for the size that does not slow down the guest.
    fn interval(&self) -> Duration;
}

/// By the control socket.
impl Control for Daemon {
    fn size(&self) -> Result<Size> {
        Ok(Size::bytes(self.info()?.size))
    }

    fn request(&self, size: Size) -> Result<()> {
        let bytes = size.as_bytes();
        self.call::<Value>(&Request::set(bytes))?;
        Ok(())
    }

    fn poll_statistics(&self, seconds: u32) -> Result<()> {
        self.call::<Value>(&Request::SetStatsInterval { seconds })?;
        Ok(())
    }

    fn statistics(&self) -> Result<Option<Sample>> {
        let Ok(stats) = self.call::<Stats>(&Request::Stats { fresh: false }) else {
            return Ok(None);
        };
        let now = SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
        Ok(Some(Sample {
            values: stats
                .values
                .iter()
                .map(|(stat, &value)| (stat.to_string(), value))
                .collect(),
            taken: now - stats.age,
        }))
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(1)
    }
}

/// QEMU's own device.
#[derive(Debug)]
pub(crate) struct QemuDevice {
    pub(crate) qmp: Arc<Qmp>,
    /// The VM's memory: QEMU's number is the part that the guest keeps.
    pub(crate) memory: Size,
}

impl QemuDevice {
    const QOM_PATH: &str = "/machine/peripheral/balloon0";
}

impl Control for QemuDevice {
    fn size(&self) -> Result<Size> {
        #[derive(Deserialize)]
        struct BalloonInfo {
            /// The memory that the guest keeps, in bytes.
            actual: u64,
        }

        let info: BalloonInfo = self.qmp.execute("query-balloon", &json!({}))?;
        Ok(self.memory - Size::bytes(info.actual))
    }

    fn request(&self, size: Size) -> Result<()> {
        let kept = (self.memory - size).as_bytes();
        self.qmp
            .execute::<Value>("balloon", &json!({ "value": kept }))?;
        Ok(())
    }

    fn poll_statistics(&self, seconds: u32) -> Result<()> {
        self.qmp.execute::<Value>(
            "qom-set",
            &json!({ "path": Self::QOM_PATH, "property": "guest-stats-polling-interval", "value": seconds }),
        )?;
        Ok(())
    }

    fn statistics(&self) -> Result<Option<Sample>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct GuestStats {
            stats: BTreeMap<String, u64>,
            last_update: u64,
        }

        let stats: GuestStats = self.qmp.execute(
            "qom-get",
            &json!({ "path": Self::QOM_PATH, "property": "guest-stats" }),
        )?;
        Ok((stats.last_update > 0).then(|| Sample {
            values: stats
                .stats
                .into_iter()
                .map(|(name, value)| (name.trim_start_matches("stat-").to_owned(), value))
                .collect(),
            taken: stats.last_update,
        }))
    }

    /// QEMU answers under the lock that its devices need. Its own event comes at most once a second, which is too
    /// rare for measurements.
    fn interval(&self) -> Duration {
        Duration::from_millis(20)
    }
}
