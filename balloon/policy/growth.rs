// SPDX-License-Identifier: GPL-2.0

//! What keeps the balloon from growing, and until when.

#![forbid(unsafe_code)]

use crate::{
    balloon::policy::{
        backoff::{
            Backoff,
            Cause, //
        },
        stop_reason::StopReason, //
    },
    device::timeouts, //
};

use kernel::{
    page::PAGE_SHIFT,
    time::Msecs, //
};

/// A balloon that could not grow tries again before its pause ends when so many more kernel pages
/// are available above the reserve: 16 MiB.
const WORTHWHILE: usize = 1 << (24 - PAGE_SHIFT);

/// The attempts to grow towards the target. Points in time are milliseconds on a clock that does
/// not go back, and memory is in kernel pages.
pub(crate) struct Growth {
    backoff: Backoff,
    /// Why the balloon cannot grow, if it has to.
    stopped: Option<StopReason>,
    /// The available memory above the reserve when the balloon could not grow.
    spare: usize,
    /// Whether there are no more memory blocks to take for this target.
    blocks_taken: bool,
}

impl Growth {
    /// Returns the state before any attempt.
    pub(crate) const fn new() -> Self {
        Self {
            backoff: Backoff::new(),
            stopped: None,
            spare: 0,
            blocks_taken: false,
        }
    }

    /// Begins again: there is a new target, or the settings have changed.
    pub(crate) fn restart(&mut self) {
        self.blocks_taken = false;
        self.backoff.reset();
        self.stopped = None;
    }

    /// The balloon need not grow.
    pub(crate) fn rest(&mut self) {
        self.backoff.reset();
    }

    /// The balloon has grown.
    pub(crate) fn succeed(&mut self) {
        self.stopped = None;
    }

    /// The balloon could not grow for `reason` at `now`, with `spare` pages above the reserve.
    /// Returns whether this is the first failure.
    pub(crate) fn fail(&mut self, reason: StopReason, spare: usize, now: i64) -> bool {
        self.stopped = Some(reason);
        self.blocks_taken = false;
        self.spare = spare;
        self.backoff.fail(Cause::NoMemory, now)
    }

    /// The guest ran out of memory. Returns whether this is the first failure.
    pub(crate) fn fail_after_oom(&mut self, now: i64) -> bool {
        self.stopped = Some(StopReason::AfterOom);
        self.backoff.fail(Cause::OutOfMemory, now)
    }

    /// Returns why the balloon cannot grow, if it has to.
    pub(crate) fn stopped(&self) -> Option<StopReason> {
        self.stopped
    }

    /// Returns whether the previous attempt failed.
    pub(crate) fn is_failing(&self) -> bool {
        self.backoff.is_failing()
    }

    /// Returns after how many milliseconds to check for memory again; `None` if the balloon may
    /// grow now: there is no pause, or it ends early. `ready` pages are in memory blocks that were
    /// taken, and `spare` returns how many are available above the reserve.
    pub(crate) fn pause(
        &self,
        now: i64,
        ready: usize,
        spare: impl FnOnce() -> usize,
    ) -> Option<Msecs> {
        let pause = self.backoff.remaining(now)?;
        if self.stopped == Some(StopReason::AfterOom) {
            return Some(pause);
        }
        if ready > 0 || spare().saturating_sub(self.spare) >= WORTHWHILE {
            return None;
        }

        // The guest may get memory.
        Some(pause.min(timeouts::MISSED_INTERRUPT))
    }

    /// Returns whether memory blocks may be taken: not twice for a target, unless taking them was
    /// cancelled.
    pub(crate) fn may_take_blocks(&self, was_cancelled: bool) -> bool {
        !self.blocks_taken || was_cancelled
    }

    /// Memory blocks are being taken.
    pub(crate) fn take_blocks(&mut self) {
        self.blocks_taken = true;
        self.stopped = None;
    }
}
