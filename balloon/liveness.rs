// SPDX-License-Identifier: GPL-2.0

//! Whether the device has just responded. QEMU does not survive an access to the configuration space
//! after the daemon of the device has ended.

#![forbid(unsafe_code)]

use crate::device::timeouts;

/// When the device has responded.
///
/// Points in time are milliseconds on a clock that does not go back.
#[derive(Clone, Copy)]
pub(crate) struct Liveness {
    /// When used buffers were last looked for.
    looked: Option<i64>,
    /// When the device has last shown that it responds.
    alive: Option<i64>,
}

impl Liveness {
    /// Returns the state before any response.
    pub(crate) const fn new() -> Self {
        Self {
            looked: None,
            alive: None,
        }
    }

    /// Takes note at `now` whether the device has used buffers since the last time, and
    /// whether it has interrupted. Returns whether the device has just responded.
    ///
    /// Used buffers that were found without an interrupt may be older than the end of the device, unless
    /// they were not there a moment ago. The kernel calls nothing for an interrupt that comes later.
    pub(crate) fn note(&mut self, now: i64, answered: bool, interrupted: bool) -> bool {
        let recent = i64::from(timeouts::ALIVE);
        let is_recent = |at: Option<i64>| at.is_some_and(|at| now.saturating_sub(at) < recent);

        if answered && (interrupted || is_recent(self.looked)) {
            self.alive = Some(now);
        }
        self.looked = Some(now);
        is_recent(self.alive)
    }
}
