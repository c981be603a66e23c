// SPDX-License-Identifier: GPL-2.0

//! Whether the device has just responded. QEMU aborts on an access to the configuration space after
//! the daemon of the device has ended.

#![forbid(unsafe_code)]

use crate::device::timeouts;

/// The time of the device's responses.
///
/// Points in time are milliseconds on a clock that does not go back.
pub(crate) struct Liveness {
    /// When the driver last checked for used buffers.
    checked: Option<i64>,
    /// When the driver last found used buffers.
    found: Option<i64>,
    /// When the device has last shown that it responds.
    alive: Option<i64>,
}

impl Liveness {
    /// Returns the state before any response.
    pub(crate) const fn new() -> Self {
        Self {
            checked: None,
            found: None,
            alive: None,
        }
    }

    /// Records at `now` whether the device has used buffers since the previous call, and whether it
    /// is known to have used some just now. Returns whether the device has just responded.
    ///
    /// If that is not known, the device may have used the buffers long ago and have ended since. If
    /// the previous call was a moment ago, it has used them since then. Their interrupt may still
    /// come, but the kernel ignores an interrupt when no used buffers are left. An OOM notifier
    /// that has waited for them may set the flag after they were found.
    pub(crate) fn note(&mut self, now: i64, has_used: bool, just_used: bool) -> bool {
        let recent = i64::from(timeouts::ALIVE);
        let is_recent = |at: Option<i64>| at.is_some_and(|at| now.saturating_sub(at) < recent);

        let found = if has_used { Some(now) } else { self.found };
        if just_used && is_recent(found) || has_used && is_recent(self.checked) {
            self.alive = Some(now);
        }
        self.found = found;
        self.checked = Some(now);
        is_recent(self.alive)
    }
}
