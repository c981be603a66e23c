// SPDX-License-Identifier: GPL-2.0

//! A rate limit for log messages that the host can trigger.

#![forbid(unsafe_code)]

use crate::device::timeouts;

use kernel::time::{
    Instant,
    Monotonic, //
};

/// The time of the last message.
pub(crate) struct LogLimit(Option<Instant<Monotonic>>);

impl LogLimit {
    /// Returns an empty one.
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// Returns whether another message may be logged, and counts it as logged.
    pub(crate) fn allows(&mut self) -> bool {
        let now = Instant::now();

        if self
            .0
            .is_some_and(|last| now - last < timeouts::LOG_INTERVAL)
        {
            return false;
        }
        self.0 = Some(now);
        true
    }
}
