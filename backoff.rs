// SPDX-License-Identifier: GPL-2.0

//! When to try again after memory ran out.

#![forbid(unsafe_code)]

use kernel::time::Msecs;

/// How long the first pause is.
const FIRST_PAUSE: Msecs = 200;

/// How long a pause may become.
const LONGEST_PAUSE: Msecs = 30_000;

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

    /// Takes note of a failure at `now`. Returns whether it is the first one.
    pub(crate) fn fail(&mut self, now: i64) -> bool {
        let first = self.pause.is_none();
        let length = self.pause.map_or(FIRST_PAUSE, |(last, _)| {
            last.saturating_mul(2).min(LONGEST_PAUSE)
        });

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

    /// Forgets all failures.
    pub(crate) fn reset(&mut self) {
        self.pause = None;
    }
}
