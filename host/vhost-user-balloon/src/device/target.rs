// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The size that the device requests: the target, limited by the floor, the boot grace and the
//! guest's statistics.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use std::{io, mem};

use balloon_control::Changes;
use balloon_wire::BALLOON_PAGE_SIZE;
use log::{error, info, warn};

use super::Device;
use super::lease::{NewTarget, clock};
use super::state::State;
use crate::sync::lock;
use crate::virtio::config::bytes;
use crate::virtio::features::Feature;

/// A balloon whose size has not changed for so long is at rest: a driver reports a changing size
/// once a second.
pub(super) const REST: Duration = Duration::from_secs(2);

/// How long a driver may take to send its first statistics. Until then the balloon keeps its size: the guest may have
/// much less memory than the VMM has shared.
pub(super) const REPORT_TIME: Duration = Duration::from_secs(5);

/// Why a target is not set and kept.
#[derive(Debug)]
pub enum SetError {
    /// Another target is in force, in balloon pages. Nothing has changed.
    Conflict(u32),
    /// It is set, but lost when the process ends.
    Unsaved(io::Error),
}

/// The largest page of a guest's kernel, in balloon pages.
const LARGEST_PAGE: u32 = 16;

impl Device {
    /// The guest's memory, the balloon's included, in bytes: from its statistics, or the memory that the VMM has
    /// shared. A VMM also shares other memory: unplugged memory of virtio-mem devices, NVDIMMs, memory of PCI
    /// devices.
    pub fn guest_memory(&self) -> Option<u64> {
        let shared = Some(lock(&self.sizes).memory).filter(|&bytes| bytes > 0)?;
        // Linux subtracts the balloon from the total, unless it deflates on OOM.
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

    /// The remaining boot grace.
    pub fn grace(&self) -> Option<Duration> {
        let end = lock(&self.times).grace_end?;
        Some(end.saturating_duration_since(Instant::now())).filter(|rest| !rest.is_zero())
    }

    /// Whether the guest's driver has not sent its first statistics yet.
    pub(super) fn is_unreported(&self) -> bool {
        let started = lock(&self.times).started;
        self.interval().is_some()
            && Feature::Stats.is_in(self.features_at_work())
            && started.is_some_and(|started| started.elapsed() < REPORT_TIME)
            && lock(&self.stats).total().is_none()
    }

    /// Looks again when the driver has had its time for the first statistics.
    pub(super) fn limit_report_time(&self) {
        if self.is_unreported() {
            // Without a timer the next request of statistics has the same effect.
            self.grace.once(REPORT_TIME);
        }
    }

    /// Whether the balloon has the requested size, or has not changed for a while.
    pub(super) fn is_at_rest(&self) -> bool {
        let actual = lock(&self.state).config.actual;
        // A guest rounds up to its own pages.
        let above = actual.checked_sub(self.asked.load(SeqCst));
        let moved = lock(&self.times).moved;
        above.is_some_and(|pages| pages < LARGEST_PAGE)
            || moved.is_some_and(|moved| moved.elapsed() > REST)
    }

    /// The currently requested size, in balloon pages.
    pub(super) fn asked(&self) -> u32 {
        // An unknown driver may belong to a guest that boots.
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

    /// Notifies the guest if the requested size has changed without a client. A guest that has read it for
    /// another reason may have missed the change.
    pub(super) fn follow(&self) {
        if self.told.load(SeqCst) != self.asked() {
            self.notify();
        }
    }

    /// Starts the boot grace for a guest that boots under an earlier target.
    pub(super) fn leave_alone(&self, is_logged: bool) {
        let grace = self.settings.boot_grace;
        if grace.is_zero() || lock(&self.state).config.target == 0 {
            return;
        }
        // The timer expires after this.
        let end = Instant::now().checked_add(grace);
        if self.grace.once(grace) {
            if is_logged {
                info!(
                    "the guest has a new driver, and is left alone for {} s",
                    grace.as_secs()
                );
            }
            lock(&self.times).grace_end = end;
        }
    }

    /// Sets the target, also for a guest that boots.
    ///
    /// # Errors
    ///
    /// Another target is in force, or the file cannot be written.
    pub fn set_target(&self, new: impl Into<NewTarget>) -> Result<(), SetError> {
        let (new, now) = (new.into(), clock());
        self.end_lease(now);
        let mut state = lock(&self.state);
        let before = state.clone();
        state.set_target(new, now).map_err(SetError::Conflict)?;
        let after = state.clone();
        drop(state);
        self.leased.notify_all();
        let renewed = before.lease.is_some() && after.lease.is_some();
        let same = before.config.target == after.config.target;
        // A client that only renews a lease requests nothing of a guest that boots.
        if self.running() && !(renewed && same) {
            lock(&self.times).grace_end = None;
        }
        self.pass_on(same);
        let terms = |state: State| state.lease.map(|lease| (lease.fallback, lease.owner));
        if !same || before.lapsed || terms(before) != terms(after) {
            self.publish(Changes::info);
        }
        // The file may not have an unchanged target, if it could not be written before.
        self.save().map_err(SetError::Unsaved)
    }

    /// Lowers the target by what a client has let the device release: the guest is short of memory.
    pub fn release(&self) {
        let pages = lock(&self.state).release();
        if pages > 0 {
            info!(
                "the guest is short of memory: the target is lowered by {} bytes",
                bytes(pages)
            );
            self.leased.notify_all();
            self.notify();
            self.publish(Changes::info);
        }
    }

    /// Notifies the guest of the target that was set, which may be the `same` as before.
    fn pass_on(&self, same: bool) {
        match same {
            true => self.follow(),
            false => self.notify(),
        }
    }

    /// Ends a lease that has run out.
    pub(super) fn end_lease(&self, now: Duration) {
        let mut state = lock(&self.state);
        let before = state.config.target;
        if !state.lapse(now) {
            return;
        }
        let after = state.config.target;
        drop(state);
        warn!(
            "the lease on the target of {} bytes has run out; the target is {} bytes now",
            bytes(before),
            bytes(after)
        );
        self.pass_on(before == after);
        self.publish(Changes::info);
        if let Err(error) = self.save() {
            error!("the end of the lease cannot be kept: {error}");
        }
    }

    /// Ends leases in time, and writes released targets to the file, as long as the process lives.
    pub fn watch_leases(&self) {
        loop {
            self.end_lease(clock());
            self.keep_release();
            let state = lock(&self.state);
            let lease = state.lease.clone();
            let until = lease.as_ref().map(|lease| lease.term.until);
            let rest = until.map_or(Duration::MAX, |until| until.saturating_sub(clock()));
            let is_same = |state: &mut State| state.lease == lease && !state.unsaved;
            drop(state.wait_while(&self.leased, rest, is_same));
        }
    }

    /// Writes a released target to the file.
    pub(super) fn keep_release(&self) {
        if !mem::take(&mut lock(&self.state).unsaved) {
            return;
        }
        if let Err(error) = self.save() {
            error!("the released target cannot be kept: {error}");
        }
    }
}
