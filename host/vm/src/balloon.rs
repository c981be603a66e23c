// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's balloon device, as the host sees it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::size::Size;

/// How often the balloon's size is asked for. QEMU's own event comes once a second at most, too
/// seldom to measure with.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long the balloon's size may stay the same on its way to a target.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A guest's balloon.
#[derive(Clone, Copy, Debug)]
pub struct Balloon<'a> {
    guest: &'a Guest,
}

#[derive(Deserialize)]
struct BalloonInfo {
    /// What the guest keeps, in bytes.
    actual: u64,
}

impl<'a> Balloon<'a> {
    pub(crate) fn new(guest: &'a Guest) -> Self {
        Self { guest }
    }

    /// How much the guest has given away.
    pub fn size(&self) -> Result<Size> {
        let info: BalloonInfo = self.guest.qmp().execute("query-balloon", &json!({}))?;
        Ok(self.guest.memory() - Size::bytes(info.actual))
    }

    /// Asks the guest to give away `size` from now on, and does not wait for it.
    pub fn request(&self, size: Size) -> Result<()> {
        let kept = (self.guest.memory() - size).as_bytes();
        self.guest
            .qmp()
            .execute::<Value>("balloon", &json!({ "value": kept }))?;
        Ok(())
    }

    /// Asks for `size` and waits for the balloon to have it. Returns how long it took.
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
        let (mut last, mut moved) = (None, Instant::now());
        loop {
            let now = self.size()?;
            watch(now);
            if now == size {
                return Ok(());
            }
            if last != Some(now) {
                (last, moved) = (Some(now), Instant::now());
            }
            if moved.elapsed() > STALL_TIMEOUT {
                bail!(
                    "the balloon is stuck at {now} on its way to {size} for {} s",
                    moved.elapsed().as_secs()
                );
            }
            self.guest.check_alive()?;
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the balloon has kept one size for `quiet`, and returns that.
    pub fn rest(&self, quiet: Duration) -> Result<Size> {
        let (mut last, mut moved) = (self.size()?, Instant::now());
        while moved.elapsed() < quiet {
            self.guest.check_alive()?;
            thread::sleep(POLL_INTERVAL);
            let now = self.size()?;
            if now != last {
                (last, moved) = (now, Instant::now());
            }
        }
        Ok(last)
    }
}
