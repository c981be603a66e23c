// SPDX-License-Identifier: GPL-2.0

//! Polling with a timeout.

use kernel::{
    io::poll::read_poll_timeout,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::Delta, //
};

/// The interval of all polls.
const INTERVAL: Delta = Delta::from_millis(1);

/// Polls `condition` until `timeout`. Returns its result, or `None` after the timeout. May sleep.
pub(crate) fn poll_timeout<T>(
    timeout: Delta,
    mut condition: impl FnMut() -> Option<T>,
) -> Option<T> {
    read_poll_timeout(|| Ok(condition()), Option::is_some, INTERVAL, timeout)
        .ok()
        .flatten()
}

/// A timeout for progress of a device. After it has expired, callers do not wait again before the
/// device has made progress.
pub(crate) struct StallTimeout {
    timeout: Delta,
    is_stalled: Atomic<bool>,
}

impl StallTimeout {
    /// Makes one with this timeout.
    pub(crate) fn new(timeout: Delta) -> Self {
        Self {
            timeout,
            is_stalled: Atomic::new(false),
        }
    }

    /// Notes that the device has made progress. Callable from any context.
    pub(crate) fn progress(&self) {
        self.is_stalled.store(false, Relaxed);
    }

    /// Polls `condition` as [`poll_timeout`] does, or once if the timeout has expired without
    /// progress since.
    pub(crate) fn poll<T>(&self, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
        if self.is_stalled.xchg(true, Relaxed) {
            return condition();
        }
        let result = poll_timeout(self.timeout, condition);

        if result.is_some() {
            self.progress();
        }
        result
    }
}
