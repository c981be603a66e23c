// SPDX-License-Identifier: GPL-2.0

//! How much of the guest's time the host may use up with requests.

#![forbid(unsafe_code)]

use kernel::time::Msecs;

/// What can be spent at once, in nanoseconds: enough for any request that makes sense.
const CAPACITY: i64 = 2_000_000_000;

/// What part of the time can be spent in the long run, as a divisor.
const SHARE: i64 = 10;

/// What can be owed at most, in nanoseconds. Time may pass that nobody has used, as when the whole
/// guest stands still, and the host must not have to wait for ever then.
const DEBT: i64 = 10_000_000_000;

/// An amount of time that is spent, and that grows again with the time that passes.
///
/// Points in time and amounts are nanoseconds, on a clock that does not go back.
pub(crate) struct Budget {
    left: i64,
    /// When `left` was right.
    then: i64,
}

impl Budget {
    /// Returns a budget of which nothing was spent, on a clock that begins at 0.
    pub(crate) const fn new() -> Self {
        Self {
            left: CAPACITY,
            then: 0,
        }
    }

    fn update(&mut self, now: i64) {
        let grown = now.saturating_sub(self.then).max(0) / SHARE;

        self.left = self.left.saturating_add(grown).min(CAPACITY);
        self.then = now;
    }

    /// Takes note of `time` that was spent by `now`.
    pub(crate) fn spend(&mut self, time: i64, now: i64) {
        self.update(now);
        self.left = self.left.saturating_sub(time.max(0)).max(-DEBT);
    }

    /// Returns how long to wait until there is something to spend, in milliseconds; `None` if there
    /// is.
    pub(crate) fn pause(&mut self, now: i64) -> Option<Msecs> {
        self.update(now);

        (self.left < 0).then(|| {
            let pause = self.left.saturating_neg().saturating_mul(SHARE) / 1_000_000;

            Msecs::try_from(pause.saturating_add(1)).unwrap_or(Msecs::MAX)
        })
    }
}
