// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon, as the host sees it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use balloon_control::{Request, Stats};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::qmp::Qmp;
use crate::size::Size;

/// How long the balloon's size may stay the same on its way to a target.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A guest's balloon.
#[derive(Clone, Copy, Debug)]
pub struct Balloon<'a> {
    guest: &'a Guest,
}

/// Statistics of the guest, as the host has got them.
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
trait Control {
    /// How much the guest has given away.
    fn size(&self) -> Result<Size>;

    /// Asks the guest to give away `size`.
    fn request(&self, size: Size) -> Result<()>;

    /// Asks the guest for statistics every so many seconds.
    fn poll_statistics(&self, seconds: u32) -> Result<()>;

    /// The statistics that have come last, if there have been any.
    fn statistics(&self) -> Result<Option<Sample>>;

    /// How often the size can be asked for without slowing the guest down.
    fn interval(&self) -> Duration;
}

/// By the control socket.
impl Control for Daemon {
    fn size(&self) -> Result<Size> {
        Ok(Size::bytes(self.info()?.size))
    }

    fn request(&self, size: Size) -> Result<()> {
        let bytes = size.as_bytes();
        self.call::<Value>(&Request::Set { bytes })?;
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
struct QemuDevice {
    qmp: Arc<Qmp>,
    /// How much memory the guest has been given: QEMU says what it keeps of that.
    memory: Size,
}

impl QemuDevice {
    const QOM_PATH: &str = "/machine/peripheral/balloon0";
}

impl Control for QemuDevice {
    fn size(&self) -> Result<Size> {
        #[derive(Deserialize)]
        struct BalloonInfo {
            /// What the guest keeps, in bytes.
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

    /// QEMU answers under the lock that its devices need. Its own event comes once a second at most, too seldom to
    /// measure with.
    fn interval(&self) -> Duration {
        Duration::from_millis(20)
    }
}

impl<'a> Balloon<'a> {
    pub(crate) fn new(guest: &'a Guest) -> Self {
        Self { guest }
    }

    /// Not kept: with each QEMU that the guest is in there is another device.
    fn control(&self) -> Arc<dyn Control> {
        let home = self.guest.home();
        match &home.daemon {
            Some(daemon) => daemon.clone(),
            None => Arc::new(QemuDevice {
                qmp: Arc::clone(&home.qmp),
                memory: self.guest.memory(),
            }),
        }
    }

    /// How much the guest has given away.
    pub fn size(&self) -> Result<Size> {
        self.control().size()
    }

    /// Asks the guest to give away `size` from now on, and does not wait for it.
    pub fn request(&self, size: Size) -> Result<()> {
        self.control().request(size)
    }

    /// Asks the guest for statistics every so many seconds.
    pub fn poll_statistics(&self, seconds: u32) -> Result<()> {
        self.control().poll_statistics(seconds)
    }

    /// The statistics that have come last, if there have been any.
    pub fn statistics(&self) -> Result<Option<Sample>> {
        self.control().statistics()
    }

    /// Asks for `size` and waits for the balloon to have it, or what comes next in whole pages of the guest. Returns how
    /// long it took.
    ///
    /// # Errors
    ///
    /// The balloon does not move for half a minute.
    pub fn settle(&self, size: Size) -> Result<Duration> {
        self.settle_watched(size, |_| ())
    }

    /// The same, and hands every size on the way to `watch`.
    pub fn settle_watched(&self, size: Size, watch: impl FnMut(Size)) -> Result<Duration> {
        let start = Instant::now();
        self.request(size)?;
        self.reach_watched(size, watch)?;
        Ok(start.elapsed())
    }

    /// Waits for the balloon to have `size`, which it has been asked for before.
    ///
    /// # Errors
    ///
    /// The balloon does not move for half a minute.
    pub fn reach(&self, size: Size) -> Result<()> {
        self.reach_watched(size, |_| ())
    }

    fn reach_watched(&self, size: Size, mut watch: impl FnMut(Size)) -> Result<()> {
        let size = size.next_multiple_of(self.guest.page_size());
        let (mut last, mut stopwatch) = (None, self.guest.stopwatch());
        loop {
            let now = self.size()?;
            watch(now);
            if now == size {
                return Ok(());
            }
            if last != Some(now) {
                last = Some(now);
                stopwatch.restart();
            }
            if stopwatch.has_passed(STALL_TIMEOUT) {
                bail!(
                    "the balloon is stuck at {now} on its way to {size} for {} s, with {} available",
                    STALL_TIMEOUT.as_secs(),
                    self.guest.meminfo()?.available
                );
            }
            self.guest.check_alive()?;
            thread::sleep(self.control().interval());
        }
    }

    /// Waits until the balloon has kept one size for `quiet`, and returns that.
    pub fn rest(&self, quiet: Duration) -> Result<Size> {
        let (mut last, mut stopwatch) = (self.size()?, self.guest.stopwatch());
        while !stopwatch.has_passed(quiet) {
            self.guest.check_alive()?;
            thread::sleep(self.control().interval());
            let now = self.size()?;
            if now != last {
                last = now;
                stopwatch.restart();
            }
        }
        Ok(last)
    }
}
