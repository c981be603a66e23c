// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon, as the host sees it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::control::{Control, Sample};
use crate::guest::Guest;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

/// Writes this driver's state to the guest's log. The C driver has none to write.
const LOG_STATE: &str = r#"
    cat /sys/kernel/debug/virtio_balloon_rs-*/* 2>/dev/null |
        while read line; do echo "$line" >/dev/kmsg; done
"#;

/// A guest's balloon.
#[derive(Clone, Copy, Debug)]
pub struct Balloon<'a> {
    guest: &'a Guest,
}

impl Guest {
    /// The balloon, as the host sees it.
    pub fn balloon(&self) -> Balloon<'_> {
        Balloon { guest: self }
    }
}

impl Balloon<'_> {
    /// Not stored: each QEMU of the guest has another device.
    fn control(&self) -> Arc<dyn Control> {
        self.guest.home().control(self.guest.memory())
    }

    fn interval(&self) -> Duration {
        let wanted = self.guest.config().polling;
        wanted.unwrap_or_else(|| self.control().interval())
    }

    /// The size of the balloon.
    pub fn size(&self) -> Result<Size> {
        self.control().size()
    }

    /// Sets the target `size`, and does not wait for the guest.
    pub fn request(&self, size: Size) -> Result<()> {
        self.control().request(size)
    }

    /// Requests statistics from the guest every so many seconds.
    pub fn poll_statistics(&self, seconds: u32) -> Result<()> {
        self.control().poll_statistics(seconds)
    }

    /// The latest statistics, if the guest has sent any.
    pub fn statistics(&self) -> Result<Option<Sample>> {
        self.control().statistics()
    }

    /// Sets the target `size` and waits until the balloon has it, rounded up to whole pages of the guest. Returns how
    /// long it took.
    ///
    /// # Errors
    ///
    /// The balloon does not move for [`PATIENCE`].
    pub fn settle(&self, size: Size) -> Result<Duration> {
        self.settle_watched(size, |_| ())
    }

    /// The same, and passes each intermediate size to `watch`.
    pub fn settle_watched(&self, size: Size, watch: impl FnMut(Size)) -> Result<Duration> {
        let start = Instant::now();
        self.request(size)?;
        self.reach_watched(size, watch)?;
        Ok(start.elapsed())
    }

    /// Waits until the balloon has the target `size`, which was set before.
    ///
    /// # Errors
    ///
    /// The balloon does not move for [`PATIENCE`].
    pub fn reach(&self, size: Size) -> Result<()> {
        self.reach_watched(size, |_| ())
    }

    fn reach_watched(&self, size: Size, mut watch: impl FnMut(Size)) -> Result<()> {
        let size = size.next_multiple_of(self.guest.page_size());
        let (mut last, mut stopwatch) = (None, self.guest.stopwatch());
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            let now = self.size()?;
            watch(now);
            if now == size {
                return Ok(());
            }
            if last != Some(now) {
                last = Some(now);
                stopwatch.restart();
            } else if is_over {
                self.guest.sh(LOG_STATE)?;
                bail!(
                    "the balloon is stuck at {now} on its way to {size} for {} s ({stopwatch}), with {} available",
                    PATIENCE.as_secs(),
                    self.guest.meminfo()?.available
                );
            }
            self.guest.check_alive()?;
            thread::sleep(self.interval());
        }
    }

    /// Waits until the balloon has kept one size for `quiet`, and returns that.
    pub fn rest(&self, quiet: Duration) -> Result<Size> {
        let (mut last, mut stopwatch) = (self.size()?, self.guest.stopwatch());
        loop {
            let is_over = stopwatch.has_passed(quiet);
            self.guest.check_alive()?;
            let now = self.size()?;
            if now != last {
                last = now;
                stopwatch.restart();
            } else if is_over {
                return Ok(last);
            }
            thread::sleep(self.interval());
        }
    }
}
