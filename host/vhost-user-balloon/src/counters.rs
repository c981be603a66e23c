// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The counters, and the log of refused messages.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use balloon_control::{ByQueue, Counters as Snapshot, Received, RequestStatus};
use balloon_wire::page_set::Encoding;
use log::warn;
use strum::VariantArray;

use crate::virtio::kind::{ByKind, Kind};

/// A guest can cause any number of refusals, so the daemon logs each kind at most once in this
/// interval.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The name of the base protocol's encoding, in addition to those of page sets.
const PFNS: &str = "pfns";

/// Why the device refuses a message, or a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VariantArray)]
pub enum Refusal {
    /// The available ring or a descriptor chain is broken.
    BadChain,
    /// A buffer is not in the guest's memory.
    BadBuffer,
    /// A message is longer than the device accepts.
    TooLong,
    /// A message ends in the middle of an entry, or has none.
    Truncated,
    /// A page set or a part of an answer breaks the rules, or is not expected there (PS-V6, HR-V6).
    Malformed,
    /// Pages that are not in the guest's memory.
    OutsideMemory,
    /// Pages that were in the balloon already.
    AlreadyInBalloon,
    /// Pages that were not in the balloon.
    NotInBalloon,
    /// Hints for a command that has ended.
    StaleHint,
    /// More buffers for requests than the device peeks at.
    TooManyBuffers,
}

impl Refusal {
    const ALL: &[Self] = Self::VARIANTS;
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BadChain => "bad-chain",
            Self::BadBuffer => "bad-buffer",
            Self::TooLong => "too-long",
            Self::Truncated => "truncated",
            Self::Malformed => "malformed",
            Self::OutsideMemory => "outside-memory",
            Self::AlreadyInBalloon => "already-in-balloon",
            Self::NotInBalloon => "not-in-balloon",
            Self::StaleHint => "stale-hint",
            Self::TooManyBuffers => "too-many-buffers",
        })
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The total duration of an operation.
#[derive(Debug, Default)]
pub struct Stopwatch(Counter);

impl Stopwatch {
    /// Runs the operation, and adds its duration.
    pub fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let nanoseconds = start.elapsed().as_nanos();
        self.0.add(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        result
    }

    /// The value, in microseconds.
    pub fn microseconds(&self) -> u64 {
        self.0.get() / 1000
    }
}

#[derive(Debug, Default)]
struct Refused {
    messages: Counter,
    /// When it was last logged, in milliseconds since the start, plus 1.
    logged: AtomicU64,
}

/// All counters since the worker was started.
#[derive(Debug)]
pub struct Counters {
    /// Inflated memory, in bytes.
    pub inflated: Counter,
    /// Deflated memory, in bytes.
    pub deflated: Counter,
    /// Memory returned to the host, in bytes.
    pub discarded: Counter,
    /// The number of calls that returned memory.
    pub discards: Counter,
    /// The number of failed calls.
    pub discard_failures: Counter,
    /// How many times the host had no memory for deflated pages.
    pub prefault_failures: Counter,
    /// Listed memory that must not be returned to the host, in bytes.
    pub withheld: Counter,
    /// The duration of returning memory.
    pub discarding: Stopwatch,
    /// The duration of decoding messages of the inflate queue.
    pub translating: Stopwatch,
    /// Memory reported as free, in bytes.
    pub reported: Counter,
    /// Memory hinted as free, in bytes.
    pub hinted: Counter,
    /// Memory listed as unused in answers, in bytes.
    pub unused: Counter,
    /// The number of host requests.
    pub asked: Counter,
    /// The number of ended requests, by the number of the status.
    pub answered: [Counter; RequestStatus::ALL.len()],
    /// The number of messages on each kind of queue, in the order of the specification.
    pub messages: ByKind<Counter>,
    /// The number of events for each, in the same order: the guest's notifications, several of which may
    /// be one event, and a few when a queue is set up.
    pub notifications: ByKind<Counter>,
    /// The size of the readable messages of the inflate and the deflate queue, in bytes.
    pub received: [Counter; 2],
    /// The same, of the messages of answers.
    pub received_answers: Counter,
    /// The number of arrays of page frame numbers.
    pub pfns: Counter,
    /// The number of page sets, by encoding.
    page_sets: [Counter; Encoding::ALL.len()],
    refused: [Refused; Refusal::ALL.len()],
    start: Instant,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            inflated: Counter::default(),
            deflated: Counter::default(),
            discarded: Counter::default(),
            discards: Counter::default(),
            discard_failures: Counter::default(),
            prefault_failures: Counter::default(),
            withheld: Counter::default(),
            discarding: Stopwatch::default(),
            translating: Stopwatch::default(),
            reported: Counter::default(),
            hinted: Counter::default(),
            unused: Counter::default(),
            asked: Counter::default(),
            answered: Default::default(),
            messages: ByKind::default(),
            notifications: ByKind::default(),
            received: Default::default(),
            received_answers: Counter::default(),
            pfns: Counter::default(),
            page_sets: Default::default(),
            refused: Default::default(),
            start: Instant::now(),
        }
    }
}

impl Counters {
    /// Counts a refused message, and logs it if the last log line is old enough.
    pub fn refuse(&self, reason: Refusal) {
        let Some(refused) = self.refused.get(reason as usize) else {
            return;
        };
        refused.messages.add(1);
        let now = milliseconds(self.start.elapsed()).saturating_add(1);
        let last = refused.logged.load(Relaxed);
        if last == 0 || now.saturating_sub(last) > milliseconds(LOG_INTERVAL) {
            refused.logged.store(now, Relaxed);
            let times = refused.messages.get();
            // A driver of another device type sends messages that are no lists of pages.
            let hint = match reason {
                Refusal::Truncated => "; QEMU's device needs virtio-id=5",
                _ => "",
            };
            warn!("refused a message of the guest's driver: {reason} ({times} so far){hint}");
        }
    }

    /// Counts an ended request with this status.
    pub fn answered(&self, status: RequestStatus) {
        if let Some(answered) = self.answered.get(status as usize) {
            answered.add(1);
        }
    }

    /// Counts a page set.
    pub fn page_set(&self, encoding: Encoding) {
        if let Some(page_sets) = self.page_sets.get(encoding as usize) {
            page_sets.add(1);
        }
    }

    /// The number of messages that list pages, by encoding.
    fn encodings(&self) -> BTreeMap<String, u64> {
        let names = Encoding::ALL.iter().map(|encoding| encoding.name());
        let page_sets = names.zip(self.page_sets.iter().map(Counter::get));
        std::iter::once((PFNS, self.pfns.get()))
            .chain(page_sets)
            .map(|(name, times)| (name.to_owned(), times))
            .collect()
    }

    /// The time since the start.
    pub fn uptime(&self) -> Duration {
        self.start.elapsed()
    }

    /// The number of messages that were refused for a reason.
    pub fn refused(&self, reason: Refusal) -> u64 {
        self.refused
            .get(reason as usize)
            .map_or(0, |refused| refused.messages.get())
    }

    /// All counters, as a type of the control protocol.
    pub fn snapshot(&self) -> Snapshot {
        let [inflate, deflate] = &self.received;
        Snapshot {
            inflated: self.inflated.get(),
            deflated: self.deflated.get(),
            discarded: self.discarded.get(),
            discards: self.discards.get(),
            discard_failures: self.discard_failures.get(),
            prefault_failures: self.prefault_failures.get(),
            withheld: self.withheld.get(),
            discarding: self.discarding.microseconds(),
            translating: self.translating.microseconds(),
            reported: self.reported.get(),
            hinted: self.hinted.get(),
            unused: self.unused.get(),
            asked: self.asked.get(),
            answered: RequestStatus::ALL
                .iter()
                .copied()
                .zip(self.answered.iter().map(Counter::get))
                .filter(|&(_, times)| times > 0)
                .collect(),
            messages: by_queue(&self.messages),
            notifications: by_queue(&self.notifications),
            received: Received {
                inflate: inflate.get(),
                deflate: deflate.get(),
                requests: self.received_answers.get(),
            },
            encodings: self.encodings(),
            refused: Refusal::ALL
                .iter()
                .map(|&reason| (reason.to_string(), self.refused(reason)))
                .filter(|&(_, times)| times > 0)
                .collect::<BTreeMap<_, _>>(),
        }
    }
}

fn by_queue(counters: &ByKind<Counter>) -> ByQueue {
    let mut numbers = ByQueue::default();
    for &kind in Kind::ALL {
        let number = match kind {
            Kind::Inflate => &mut numbers.inflate,
            Kind::Deflate => &mut numbers.deflate,
            Kind::Stats => &mut numbers.stats,
            Kind::Hinting => &mut numbers.hints,
            Kind::Reporting => &mut numbers.reports,
            Kind::Requests => &mut numbers.requests,
        };
        *number = counters.of(kind).get();
    }
    numbers
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_by_their_reason() {
        let counters = Counters::default();
        counters.refuse(Refusal::Truncated);
        counters.refuse(Refusal::Truncated);
        counters.refuse(Refusal::StaleHint);
        let refused = counters.snapshot().refused;
        assert_eq!(refused.get("truncated"), Some(&2));
        assert_eq!(refused.get("stale-hint"), Some(&1));
        assert_eq!(refused.len(), 2);
    }

    #[test]
    fn times_add_up() {
        let stopwatch = Stopwatch::default();
        assert_eq!(stopwatch.microseconds(), 0);
        for _ in 0..2 {
            stopwatch.time(|| std::thread::sleep(Duration::from_millis(2)));
        }
        assert!(stopwatch.microseconds() >= 4000);
    }
}
