// SPDX-License-Identifier: GPL-2.0

//! The device's progress with the balloon's messages.

#![forbid(unsafe_code)]

use crate::{
    balloon::policy::liveness::Liveness,
    device::timeouts, //
};

use core::mem;
use kernel::time::{
    Delta,
    Instant,
    Monotonic, //
};

/// When the device has made progress, and with what.
pub(super) struct Progress {
    /// How many messages the device has used, for each queue.
    used: [usize; 2],
    liveness: Liveness,
    /// When the device has last used a message, or had a new target, or the driver has shrunk the
    /// balloon.
    last: Instant<Monotonic>,
    /// Since when there are migrations that the device does not know.
    unsettled: Option<Instant<Monotonic>>,
}

/// The device's progress since the previous call of [`Progress::collect`].
pub(super) struct Response {
    /// Whether it has used messages.
    pub(super) has_used: bool,
    /// Whether it has just responded.
    pub(super) is_alive: bool,
}

impl Progress {
    /// Begins now.
    pub(super) fn new() -> Self {
        Self {
            used: [0; 2],
            liveness: Liveness::new(),
            last: Instant::now(),
            unsettled: None,
        }
    }

    /// Records at `now`, in milliseconds, that the device has used the number `used` of messages on
    /// each queue since the beginning, and whether it is known to have used some just now.
    pub(super) fn collect(&mut self, now: i64, used: [usize; 2], just_used: bool) -> Response {
        let has_used = mem::replace(&mut self.used, used) != used;

        Response {
            has_used,
            is_alive: self.liveness.note(now, has_used, just_used),
        }
    }

    /// Begins to wait for the device.
    pub(super) fn restart(&mut self) {
        self.last = Instant::now();
    }

    /// Returns whether the device has made no progress for too long.
    pub(super) fn is_unresponsive(&self) -> bool {
        self.has_stalled(timeouts::UNRESPONSIVE)
    }

    /// Returns whether the device has made no progress for longer than `timeout`.
    pub(super) fn has_stalled(&self, timeout: Delta) -> bool {
        self.last.elapsed() > timeout
    }

    /// Records whether the device knows all migrations. Returns whether it does not get to know
    /// them.
    pub(super) fn are_migrations_stuck(&mut self, are_settled: bool) -> bool {
        self.unsettled = match are_settled {
            true => None,
            false => self.unsettled.or(Some(Instant::now())),
        };

        self.is_unresponsive()
            && self
                .unsettled
                .is_some_and(|since| since.elapsed() > timeouts::UNRESPONSIVE)
    }
}
