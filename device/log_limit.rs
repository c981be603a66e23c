// SPDX-License-Identifier: GPL-2.0

//! A limit for what the host can bring about as often as it likes, and what is worth a line in the
//! log.

#![forbid(unsafe_code)]

use crate::device::timeouts;

use kernel::time::{
    Instant,
    Monotonic, //
};

/// When something was logged.
pub(crate) struct LogLimit(Option<Instant<Monotonic>>);

impl LogLimit {
    /// Begins with nothing.
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// Returns whether it is time for another line, which is taken for written then.
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
