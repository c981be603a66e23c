// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest is asked for: the target, as far as the floor, the boot grace and the guest's statistics allow it.

use std::io;
use std::mem;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use balloon_wire::BALLOON_PAGE_SIZE;
use log::info;

use super::Device;
use crate::features::Feature;
use crate::sync::lock;

/// A balloon that has not moved for so long is at rest: a driver tells its size once a second on the way.
pub(super) const REST: Duration = Duration::from_secs(2);

/// How long a driver has to send its first statistics. Until then it keeps the balloon that it has: the guest may have
/// much less memory than the VMM has shared.
pub(super) const REPORT_TIME: Duration = Duration::from_secs(5);

/// The largest page of a guest's kernel, in balloon pages.
const LARGEST_PAGE: u32 = 16;

impl Device {
    /// How much memory the guest has, in the balloon or not, in bytes: what it says in its statistics, or what the
    /// VMM has shared. A VMM shares more than there is for the guest: what a virtio-mem device has not plugged,
    /// NVDIMMs, memory of PCI devices.
    pub fn guest_memory(&self) -> Option<u64> {
        let shared = Some(lock(&self.sizes).memory).filter(|&bytes| bytes > 0)?;
        // Linux takes what is in the balloon off the total, if it does not take it back when it runs out of memory.
        let counts_balloon = Feature::DeflateOnOom.is_in(self.acked.load(SeqCst));
        let said = lock(&self.stats)
            .total()
            .map(|(total, size)| match counts_balloon {
                true => total,
                false => total.saturating_add(size),
            });
        Some(said.unwrap_or(shared).min(shared))
    }

    /// The largest balloon that leaves the guest its floor, in bytes.
    pub fn limit(&self) -> Option<u64> {
        self.settings.floor.limit(self.guest_memory()?)
    }

    /// For how long a guest that boots is still left alone.
    pub fn grace(&self) -> Option<Duration> {
        let end = lock(&self.times).grace_end?;
        Some(end.saturating_duration_since(Instant::now())).filter(|rest| !rest.is_zero())
    }

    /// Whether the guest's driver is still to send its first statistics.
    pub(super) fn is_unreported(&self) -> bool {
        let started = lock(&self.times).started;
        let is_asked = lock(&self.state).stats_interval > 0;
        is_asked
            && Feature::Stats.is_in(self.features_at_work())
            && started.is_some_and(|started| started.elapsed() < REPORT_TIME)
            && lock(&self.stats).total().is_none()
    }

    /// Whether the balloon has the size that it is asked for, or has not moved for a while.
    pub(super) fn is_at_rest(&self) -> bool {
        let actual = lock(&self.state).config.actual;
        // A guest rounds up to its own pages.
        let above = actual.checked_sub(self.asked.load(SeqCst));
        let moved = lock(&self.times).moved;
        above.is_some_and(|pages| pages < LARGEST_PAGE)
            || moved.is_some_and(|moved| moved.elapsed() > REST)
    }

    /// How many balloon pages the guest is asked for now.
    pub(super) fn asked(&self) -> u32 {
        // A driver that has not been seen yet may be that of a guest that boots.
        let unseen = !self.running() && !self.settings.boot_grace.is_zero();
        let alone = unseen || self.grace().is_some() || self.is_unreported();
        let limit = self
            .limit()
            .map_or(u64::MAX, |bytes| bytes / BALLOON_PAGE_SIZE);
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let config = &lock(&self.state).config;
        let target = config.target.min(limit);
        if alone {
            target.min(config.actual)
        } else {
            target
        }
    }

    /// Tells the guest if what it is asked for has changed without a client. A guest that has read it for another
    /// reason may not have noticed.
    pub(super) fn follow(&self) {
        if self.told.load(SeqCst) != self.asked() {
            self.notify();
        }
    }

    /// Leaves a guest alone that boots under a target that was there before.
    pub(super) fn leave_alone(&self) {
        let grace = self.settings.boot_grace;
        if grace.is_zero() || lock(&self.state).config.target == 0 {
            return;
        }
        // The timer goes off after this.
        let end = Instant::now().checked_add(grace);
        if self.grace.once(grace) {
            info!(
                "the guest has a new driver, and is left alone for {} s",
                grace.as_secs()
            );
            lock(&self.times).grace_end = end;
        }
    }

    /// Has the guest give away so many balloon pages, also while it boots.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and the target will be forgotten with the process.
    pub fn set_target(&self, pages: u32) -> io::Result<()> {
        if self.running() {
            lock(&self.times).grace_end = None;
        }
        let before = mem::replace(&mut lock(&self.state).config.target, pages);
        if before == pages {
            self.follow();
            return Ok(());
        }
        self.notify();
        self.save()
    }

    /// Tells the guest that the configuration space has changed, now or when it has a driver. Front ends
    /// do not expect the message while there is none.
    pub(super) fn notify(&self) {
        self.told.store(self.asked(), SeqCst);
        self.config_changed.store(true, SeqCst);
        if self.running() && self.config_changed.swap(false, SeqCst) {
            self.channel.config_changed();
        }
    }
}
