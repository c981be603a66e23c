// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page reporting (specification, clause 5.5.6.7).
//!
//! The buffers of a message are free memory. The guest may use the memory again when the device has
//! used them, so the device returns it to the host before that. The memory is not in the balloon.

use std::ops::Range;

use vm_memory::Address;

use super::virtqueue::{Chain, Progress, Receiver, buffers};
use crate::budget::Budget;
use crate::counters::{Counters, Refusal};
use crate::memory::balloon::Balloon;
use crate::memory::discard::{Discarder, Pieces};

/// The maximum number of ranges in a message, and the number after which the device acts on them.
const MAX_RANGES: usize = 8 << 10;

/// The receiver of the reporting queue.
#[derive(Debug)]
pub struct Reporting<'a> {
    /// The guest's memory.
    pub balloon: &'a Balloon,
    /// Returns memory to the host.
    pub discarder: &'a mut Discarder,
    /// The counters.
    pub counters: &'a Counters,
    /// Whether the guest relies on the content of its free pages. Then the device does not discard
    /// them, since a hole reads as zeroes (specification, clause 5.5.6.7.2).
    pub keep: bool,
    /// Space for the ranges of a batch, as guest physical addresses in bytes.
    pub ranges: &'a mut Vec<Range<u64>>,
    /// Space for the pieces of a batch.
    pub pieces: &'a mut Pieces,
}

impl Reporting<'_> {
    fn report(&mut self, chain: Chain<'_>) -> Result<(), Refusal> {
        let before = self.ranges.len();
        let mut result = Ok(());
        let whole = buffers(chain, |descriptor| {
            let start = descriptor.addr().raw_value();
            if !descriptor.is_write_only() || descriptor.len() == 0 {
                result = Err(Refusal::BadBuffer);
            } else if self.ranges.len() - before >= MAX_RANGES {
                result = Err(Refusal::TooLong);
            } else if let Some(end) = start.checked_add(descriptor.len().into()) {
                self.ranges.push(start..end);
            } else {
                result = Err(Refusal::OutsideMemory);
            }
        });
        let result = result.and(whole);
        if result.is_err() {
            self.ranges.truncate(before);
        }
        result
    }
}

impl Receiver for Reporting<'_> {
    fn take(&mut self, chain: Chain<'_>, again: bool) -> bool {
        if let (Err(reason), false) = (self.report(chain), again) {
            self.counters.refuse(reason);
        }
        self.ranges.len() < MAX_RANGES
    }

    fn finish(&mut self, done: &mut u64, budget: Budget) -> Progress {
        let first = *done == 0;
        self.ranges.sort_unstable_by_key(|range| range.start);
        // Memory that is listed many times is discarded once: the time of a hole is proportional to
        // its size.
        self.ranges.dedup_by(|next, range| {
            let overlaps = next.start <= range.end;
            if overlaps {
                range.end = range.end.max(next.end);
            }
            overlaps
        });
        for range in self.ranges.drain(..) {
            let inside = self.balloon.whole_granules(&range, self.pieces);
            if first {
                self.counters.reported.add(inside);
            }
            if first && inside < range.end - range.start {
                self.counters.refuse(Refusal::OutsideMemory);
            }
        }
        if self.keep {
            self.pieces.clear();
        }
        match self
            .discarder
            .discard(self.pieces, self.counters, done, budget)
        {
            true => Progress::Done,
            false => Progress::More,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::discard::Granularity;
    use crate::testing::GuestQueue;
    use vm_memory::{Bytes, GuestAddress};

    fn run(guest: &GuestQueue, keep: bool) -> Counters {
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
        let counters = Counters::default();
        let mut receiver = Reporting {
            balloon: &balloon,
            discarder: &mut Discarder::default(),
            counters: &counters,
            keep,
            ranges: &mut Vec::new(),
            pieces: &mut Pieces::default(),
        };
        guest.serve(&counters, &mut receiver);
        counters
    }

    fn guest() -> GuestQueue {
        let guest = GuestQueue::new();
        guest
            .memory
            .write_slice(&[1; 16 * 4096], GuestAddress(1 << 20))
            .unwrap();
        guest
    }

    fn pages(guest: &GuestQueue) -> Vec<u8> {
        (0..5)
            .map(|page| {
                guest
                    .memory
                    .read_obj(GuestAddress((1 << 20) + page * 4096))
                    .unwrap()
            })
            .collect()
    }

    #[test]
    fn reported_memory_is_given_back() {
        let mut guest = guest();
        guest.send_writable(&[((1 << 20) + 4096, 4096), ((1 << 20) + 3 * 4096, 4000)]);
        guest.send_writable(&[((1 << 20) + 2 * 4096, 4096)]);
        let counters = run(&guest, false);
        assert_eq!(pages(&guest), [1, 0, 0, 1, 1]);
        assert_eq!(counters.reported.get(), 2 * 4096 + 4000);
        assert_eq!(counters.discards.get(), 1);
        assert_eq!(guest.used(), 2);
    }

    #[test]
    fn what_is_reported_many_times_is_given_back_once() {
        let mut guest = guest();
        for _ in 0..3 {
            guest.send_writable(&[(1 << 20, 2 * 4096), ((1 << 20) + 4096, 2 * 4096)]);
        }
        let counters = run(&guest, false);
        assert_eq!(pages(&guest), [0, 0, 0, 1, 1]);
        assert_eq!(counters.discards.get(), 1);
        assert_eq!(counters.reported.get(), 3 * 4096);
    }

    #[test]
    fn poisoned_memory_is_left_alone() {
        let mut guest = guest();
        guest.send_writable(&[((1 << 20) + 4096, 4096)]);
        let counters = run(&guest, true);
        assert_eq!(pages(&guest), [1; 5]);
        assert_eq!(counters.discards.get(), 0);
        assert_eq!(guest.used(), 1);
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let mut guest = guest();
        guest.send(&[b"readable"]);
        guest.send_writable(&[(u64::MAX - 1, 4096)]);
        guest.send_writable(&[((16 << 20) - 4096, 8192)]);
        guest.send_writable(&[((1 << 20) + 4096, 4096), (1 << 20, 0)]);
        let counters = run(&guest, false);
        assert_eq!(counters.refused(Refusal::BadBuffer), 2);
        assert_eq!(counters.refused(Refusal::OutsideMemory), 2);
        assert_eq!(pages(&guest), [1; 5]);
        assert_eq!(guest.used(), 4);
    }
}
