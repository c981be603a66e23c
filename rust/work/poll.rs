// SPDX-License-Identifier: GPL-2.0

//! Polling with a timeout.

use kernel::{
    io::poll::read_poll_timeout,
    time::Delta, //
};

/// Polls `condition` every millisecond, for as long as `timeout` says. Returns what it returns, or
/// `None` in the end. May sleep.
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
