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

/// Polls `condition` every millisecond, until `timeout`. Returns its result, or `None` after the
/// timeout. May sleep.
pub(crate) fn within<T>(timeout: Delta, condition: impl FnMut() -> Option<T>) -> Option<T> {
    poll(Delta::from_millis(1), timeout, condition)
}

/// The same at intervals of `interval`.
pub(crate) fn poll<T>(
    interval: Delta,
    timeout: Delta,
    mut condition: impl FnMut() -> Option<T>,
) -> Option<T> {
    read_poll_timeout(|| Ok(condition()), Option::is_some, interval, timeout)
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

    /// Polls `condition` as [`within`] does, or once if the timeout has expired without progress
    /// since.
    pub(crate) fn poll<T>(&self, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
        if self.is_stalled.xchg(true, Relaxed) {
            return condition();
        }
        let result = within(self.timeout, condition);

        if result.is_some() {
            self.progress();
        }
        result
    }
}
