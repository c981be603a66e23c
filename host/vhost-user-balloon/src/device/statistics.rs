// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The schedule of statistics requests.

use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use balloon_control::Changes;
use log::error;

use super::Device;
use crate::sync::lock;
use crate::virtio::kind::Kind;

/// The longest interval, and its number, of statistics requests after the VMM has changed its memory.
const SOON: Duration = Duration::from_secs(1);
pub(super) const SOON_TIMES: u32 = 10;

impl Device {
    /// The last sample of the guest's statistics.
    pub fn stats(&self) -> Option<balloon_control::Stats> {
        lock(&self.stats).answer()
    }

    /// Requests a new sample from the guest, and waits for it as long as there is a front end.
    pub fn fresh_stats(&self, timeout: Duration) -> Option<balloon_control::Stats> {
        let mut stats = lock(&self.stats);
        stats.want();
        let before = stats.sequence();
        let number = Kind::Stats.number(self.acked.load(SeqCst))?;
        self.wake(number);
        let stats = stats.wait_while(&self.sampled, timeout, |stats| {
            self.connected() && stats.sequence() == before
        });
        stats.answer().filter(|_| stats.sequence() != before)
    }

    /// Requests another sample when the guest has read its first target. Before that a balloon is not known to be at rest,
    /// and a sample does not tell the guest's memory.
    pub(super) fn repeat_first_sample(&self) {
        let mut stats = lock(&self.stats);
        if stats.total().is_some() {
            return;
        }
        stats.want();
        drop(stats);
        if let Some(number) = Kind::Stats.number(self.acked.load(SeqCst)) {
            self.wake(number);
        }
    }

    /// Sets the daemon's own interval of statistics requests in seconds, and makes one at once. 0 is never.
    ///
    /// # Errors
    ///
    /// The system has no such timer, or the file cannot be written.
    pub fn set_stats_interval(&self, seconds: u32) -> io::Result<()> {
        self.arm(seconds)?;
        lock(&self.state).stats_interval = seconds;
        self.publish(Changes::info);
        self.save()
    }

    /// Sets the shortest interval that a subscriber wants.
    pub fn set_wished_interval(&self, interval: Option<Duration>) {
        let wished = interval.map_or(0, |interval| interval.as_millis());
        let wished = u64::try_from(wished).unwrap_or(u64::MAX);
        if self.wished.swap(wished, SeqCst) == wished {
            return;
        }
        if self.is_outdated() {
            return self.ask_soon();
        }
        let seconds = lock(&self.state).stats_interval;
        if let Err(error) = self.arm(seconds) {
            error!("cannot set a timer: {error}");
        }
    }

    /// The interval of statistics requests: the shortest of the daemon's own and those of subscribers.
    pub(super) fn interval(&self) -> Option<Duration> {
        let seconds = lock(&self.state).stats_interval;
        self.shortest(seconds)
    }

    /// The same with another interval of the daemon's own, in seconds.
    fn shortest(&self, seconds: u32) -> Option<Duration> {
        let own = Duration::from_secs(seconds.into());
        let wished = Duration::from_millis(self.wished.load(SeqCst));
        let intervals = [own, wished].into_iter();
        intervals.filter(|interval| !interval.is_zero()).min()
    }

    pub(super) fn arm(&self, seconds: u32) -> io::Result<()> {
        self.soon.store(0, SeqCst);
        match self.shortest(seconds) {
            // The first request is made at once: a client that changes the interval needs a sample.
            Some(interval) => self.timer.every(Duration::from_millis(1), interval),
            None => self.timer.stop(),
        }
    }

    /// Whether the guest may have more memory than its last statistics report.
    pub fn is_outdated(&self) -> bool {
        self.soon.load(SeqCst) > 0
    }

    /// Requests statistics a few times, since the guest may have got more memory, and needs some time before it uses
    /// that.
    pub(super) fn ask_soon(&self) {
        let Some(interval) = self.interval() else {
            return lock(&self.stats).forget_total();
        };
        if lock(&self.stats).total().is_some() {
            let interval = interval.min(SOON);
            let times = (SOON * SOON_TIMES).as_millis() / interval.as_millis();
            self.soon
                .store(times.try_into().unwrap_or(u32::MAX), SeqCst);
            self.ask_every(interval);
        }
    }

    /// Returns to the usual interval after these requests.
    pub(super) fn asked_soon(&self) {
        if self.is_outdated() && self.soon.fetch_sub(1, SeqCst) == 1 {
            self.arm_ordinary();
        }
    }

    pub(super) fn arm_ordinary(&self) {
        // Without an interval this stops the timer.
        self.ask_every(self.interval().unwrap_or_default());
    }

    fn ask_every(&self, interval: Duration) {
        if let Err(error) = self.timer.every(interval, interval) {
            error!("cannot set a timer: {error}");
        }
    }
}
