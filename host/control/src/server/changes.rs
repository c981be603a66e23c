// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What has changed, for subscribers.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::protocol::Request;

/// Which responses have changed. To publish a change takes a lock for a moment, and waits for no subscriber: a
/// subscriber requests the response when it is ready for it, so that several changes become one event.
#[derive(Debug, Default)]
pub struct Changes {
    counts: Mutex<Counts>,
    published: Condvar,
    /// How many subscribers want each interval of statistics.
    intervals: Mutex<BTreeMap<Duration, usize>>,
}

/// How often each response has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    info: u64,
    stats: u64,
}

impl Changes {
    /// The response to [`Request::Info`] has changed.
    pub fn info(&self) {
        self.publish(|counts| counts.info += 1);
    }

    /// There is a new sample of the guest's statistics.
    pub fn stats(&self) {
        self.publish(|counts| counts.stats += 1);
    }

    /// Adds a subscriber who wants this interval of statistics. Passes the shortest one on.
    pub(super) fn add(&self, interval: Duration, pass_on: impl FnOnce(Option<Duration>)) {
        let mut intervals = self.intervals();
        *intervals.entry(interval).or_default() += 1;
        // Under the lock, so that an older one is not passed on later.
        pass_on(intervals.keys().next().copied());
    }

    /// Removes a subscriber who wants this interval of statistics. Passes the shortest of the others on.
    pub(super) fn remove(&self, interval: Duration, pass_on: impl FnOnce(Option<Duration>)) {
        let mut intervals = self.intervals();
        if let Some(count) = intervals.get_mut(&interval) {
            *count -= 1;
        }
        intervals.retain(|_, count| *count > 0);
        pass_on(intervals.keys().next().copied());
    }

    fn intervals(&self) -> MutexGuard<'_, BTreeMap<Duration, usize>> {
        self.intervals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.published.notify_all();
    }
}

/// A subscriber of changes.
#[derive(Debug)]
pub(super) struct Subscriber<'a> {
    changes: &'a Changes,
    /// The changes that the subscriber knows. At first all is new.
    seen: Option<Counts>,
}

impl<'a> Subscriber<'a> {
    pub(super) const fn new(changes: &'a Changes) -> Self {
        Self {
            changes,
            seen: None,
        }
    }

    /// Waits for changes, and for `limit` at most. Returns the requests with new responses.
    pub(super) fn wait(&mut self, limit: Duration) -> Vec<Request> {
        let Changes {
            counts, published, ..
        } = self.changes;
        let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = self.seen;
        let waited = published.wait_timeout_while(counts, limit, |counts| seen == Some(*counts));
        let (counts, _) = waited.unwrap_or_else(PoisonError::into_inner);
        self.seen = Some(*counts);
        let stats = seen.is_none_or(|seen| seen.stats != counts.stats);
        let info = seen.is_none_or(|seen| seen.info != counts.info);
        let stats = stats.then_some(Request::Stats { fresh: false });
        stats
            .into_iter()
            .chain(info.then_some(Request::Info {}))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscriber_gets_each_change_once() {
        const STATS: Request = Request::Stats { fresh: false };
        let changes = Changes::default();
        let mut subscriber = Subscriber::new(&changes);
        let mut wait = || subscriber.wait(Duration::ZERO);
        assert_eq!(wait(), [STATS, Request::Info {}]);
        for _ in 0..3 {
            changes.stats();
        }
        assert_eq!(wait(), [STATS]);
        changes.info();
        changes.stats();
        assert_eq!(wait(), [STATS, Request::Info {}]);
        assert_eq!(wait(), []);
    }
    #[test]
    fn the_shortest_interval_of_all_subscribers_counts() {
        let changes = Changes::default();
        let at = Duration::from_millis;
        let mut shortest = None;
        for (interval, expected) in [(500, 500), (100, 100), (200, 100), (100, 100)] {
            changes.add(at(interval), |now| shortest = now);
            assert_eq!(shortest, Some(at(expected)));
        }
        for (interval, expected) in [
            (100, Some(100)),
            (100, Some(200)),
            (200, Some(500)),
            (500, None),
        ] {
            changes.remove(at(interval), |now| shortest = now);
            assert_eq!(shortest, expected.map(at));
        }
    }
}
