// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Times that end, and that the next worker process keeps.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A time by a clock that begins when the host is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// When a client requested it. A time ahead of the clock is from before a reboot of the host, which ends it.
    pub from: Duration,
    /// When it ends.
    pub until: Duration,
}

impl Term {
    /// A time from `now` on.
    pub fn new(now: Duration, time: Duration) -> Self {
        Self {
            from: now,
            until: now.saturating_add(time),
        }
    }

    /// The remaining time.
    pub fn rest(self, now: Duration) -> Option<Duration> {
        let rest = self.until.checked_sub(now)?;
        (self.from <= now && !rest.is_zero()).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_its_time_or_with_a_reboot() {
        let at = Duration::from_millis;
        let term = Term::new(at(900), at(100));
        assert_eq!(term.rest(at(900)), Some(at(100)));
        assert_eq!(term.rest(at(999)), Some(at(1)));
        assert_eq!(term.rest(at(1000)), None);
        assert_eq!(term.rest(at(899)), None);
    }
}
