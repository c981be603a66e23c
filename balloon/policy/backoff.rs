// SPDX-License-Identifier: GPL-2.0

//! When to try again after memory ran out.

#![forbid(unsafe_code)]

use crate::device::timeouts;

use kernel::time::Msecs;

/// Why the balloon does not grow.
#[derive(Clone, Copy)]
pub(crate) enum Cause {
    /// No memory could be allocated.
    NoMemory,
    /// The guest would have killed a process. If the balloon grew again too soon, the guest would
    /// run out of memory again, and the balloon would oscillate.
    OutOfMemory,
}

impl Cause {
    /// Returns the lengths of the first and of the longest pause.
    const fn pauses(self) -> (Msecs, Msecs) {
        match self {
            Self::NoMemory => timeouts::NO_MEMORY_PAUSES,
            Self::OutOfMemory => timeouts::OUT_OF_MEMORY_PAUSES,
        }
    }
}

/// A pause that becomes twice as long with each failure.
///
/// Points in time are milliseconds on a clock that does not go back.
#[derive(Clone, Copy)]
pub(crate) struct Backoff {
    /// The length of the pause, and when it ends. `None` if nothing has failed.
    pause: Option<(Msecs, i64)>,
}

impl Backoff {
    /// Returns the state before any failure.
    pub(crate) const fn new() -> Self {
        Self { pause: None }
    }

    /// Records a failure at `now`. Returns whether it is the first one.
    ///
    /// A failure during a pause restarts the pause, with the length for its cause at most.
    pub(crate) fn fail(&mut self, cause: Cause, now: i64) -> bool {
        let (shortest, longest) = cause.pauses();
        let pausing = self.remaining(now).is_some();
        let length = match self.pause {
            None => shortest,
            Some((last, _)) if pausing => last.max(shortest),
            Some((last, _)) => last.saturating_mul(2).min(longest).max(shortest),
        };
        let first = self.pause.is_none();

        self.pause = Some((length, now.saturating_add(i64::from(length))));
        first
    }

    /// Returns how much of the pause is left at `now`, in milliseconds; `None` if there is none.
    pub(crate) fn remaining(&self, now: i64) -> Option<Msecs> {
        let (length, end) = self.pause?;

        // A clock that went back must not make the pause longer.
        Msecs::try_from(end.saturating_sub(now))
            .ok()
            .filter(|&left| left > 0)
            .map(|left| left.min(length))
    }

    /// Returns whether the previous attempt failed.
    pub(crate) fn is_failing(&self) -> bool {
        self.pause.is_some()
    }

    /// Forgets all failures.
    pub(crate) fn reset(&mut self) {
        self.pause = None;
    }
}
