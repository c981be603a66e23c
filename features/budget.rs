// SPDX-License-Identifier: GPL-2.0

//! The budget of the guest's CPU time for host requests.

#![forbid(unsafe_code)]

use crate::device::timeouts;

use kernel::{
    page::PAGE_SHIFT,
    time::Msecs, //
};

/// The part of the time that can be spent in the long run, as a divisor.
const SHARE: i64 = 10;

/// The largest debt, in nanoseconds.
const DEBT: i64 = timeouts::REQUEST_DEBT.as_nanos();

/// A budget of time, which is spent, and grows again as time passes.
///
/// Points in time and amounts are nanoseconds, on a clock that does not go back.
pub(crate) struct Budget {
    /// The largest balance.
    capacity: i64,
    left: i64,
    /// The time for which `left` is valid.
    then: i64,
}

impl Budget {
    /// Returns a full budget for a guest with so many kernel pages, on a clock that begins at 0.
    pub(crate) fn new(pages: usize) -> Self {
        let gib = i64::try_from(pages >> (30 - PAGE_SHIFT)).unwrap_or(i64::MAX);
        let capacity = timeouts::REQUEST_BUDGET_PER_GIB
            .as_nanos()
            .saturating_mul(gib)
            .max(timeouts::REQUEST_BUDGET.as_nanos());

        Self {
            capacity,
            left: capacity,
            then: 0,
        }
    }

    fn update(&mut self, now: i64) {
        let grown = now.saturating_sub(self.then).max(0) / SHARE;

        self.left = self.left.saturating_add(grown).min(self.capacity);
        self.then = now;
    }

    /// Records `time` that was spent by `now`.
    pub(crate) fn spend(&mut self, time: i64, now: i64) {
        self.update(now);
        self.left = self.left.saturating_sub(time.max(0)).max(-DEBT);
    }

    /// Returns how long to wait until there is time to spend, in milliseconds; `None` if there is
    /// some now.
    pub(crate) fn pause(&mut self, now: i64) -> Option<Msecs> {
        self.update(now);

        (self.left < 0).then(|| {
            let pause = self.left.saturating_neg().saturating_mul(SHARE) / 1_000_000;

            Msecs::try_from(pause.saturating_add(1)).unwrap_or(Msecs::MAX)
        })
    }
}
