// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The data of the thread that serves the queues.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use crate::budget::Budget;
use crate::counters::Counters;
use crate::memory::balloon::Balloon;
use crate::memory::discard::{Discarder, Pieces};
use crate::memory::hazard::Hazard;
use crate::memory::kept;
use crate::memory::sweep::{Sweep, find_zeroes};
use crate::queues::pages::Pages;
use crate::queues::virtqueue::Unfinished;
use crate::virtio::kind::ByKind;

/// The data of the thread that serves the queues. No other thread needs them while a driver is
/// active.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) balloon: Balloon,
    pub(crate) discarder: Discarder,
    pub(crate) pages: Pages,
    pub(crate) pieces: Pieces,
    pub(crate) ranges: Vec<Range<u64>>,
    pub(crate) heads: Vec<u16>,
    /// The unfinished batch of each kind of queue.
    pub(crate) unfinished: ByKind<Unfinished>,
    /// For each kind of queue, whether this is its first turn since a driver was adopted. Another worker
    /// may have begun with its messages.
    pub(crate) taken_up: ByKind<bool>,
    /// The next position in the inflate queue's available ring.
    pub(crate) position: Option<u16>,
    /// Whether the inflate queue was served since it was started.
    pub(crate) at_work: bool,
    /// The search through the balloon for memory that the host has allocated again, if there is one.
    pub(crate) sweep: Option<Sweep>,
    /// When the thread last released all locks.
    pub(crate) paused: Option<Instant>,
}

impl Work {
    /// Without memory yet. Ignores these hazards, and stores the balloon's state in a file.
    pub(crate) fn new(allowed: &[Hazard], kept: Option<&File>) -> Self {
        let mut balloon = Balloon::new(allowed);
        if let Some(kept) = kept {
            match kept.try_clone() {
                Ok(file) => balloon.keep(file),
                Err(error) => kept::give_up(kept, &error),
            }
        }
        Self {
            balloon,
            taken_up: ByKind::from_fn(|| true),
            ..Self::default()
        }
    }

    /// Discards memory of the balloon that the host has allocated again, for a bounded time. Returns how much the whole
    /// search has discarded, in bytes, when it has ended.
    pub(crate) fn sweep(&mut self, counters: &Counters, budget: Budget) -> Option<u64> {
        let mut sweep = self.sweep.take().unwrap_or_default();
        self.discarder.withhold = false;
        while let Some((piece, next)) = self.balloon.next_held(sweep.next) {
            find_zeroes(&piece, &mut self.pieces);
            let before = counters.discarded.get();
            self.discarder
                .discard(&mut self.pieces, counters, &mut 0, Budget::UNLIMITED);
            sweep.discarded += counters.discarded.get() - before;
            sweep.next = next;
            if budget.is_over() {
                self.sweep = Some(sweep);
                return None;
            }
        }
        Some(sweep.discarded)
    }

    /// Whether the inflate queue belongs to a new driver, on its first turn since it was started.
    ///
    /// A guest that was reset, or whose driver was loaded again, has an empty balloon, and there is no
    /// message for that. Pages of the previous driver would complete granules whose other pages the guest
    /// uses, and the guest would lose data. A driver sets up its rings from index 0. A front end that only
    /// stops a queue restarts it where it was stopped. So another index than the one where this device
    /// stopped belongs to a new driver. Index 0 counts as a new driver, too: for an old driver it only occurs
    /// if that driver has not inflated anything, or after a multiple of 65536 messages. Then the daemon
    /// requests an empty balloon until the boot grace ends, and the target after that. This check is in time:
    /// only the inflate queue discards memory of the balloon.
    pub(crate) fn is_new_driver(&self, next: u16) -> bool {
        next == 0 || self.position.is_some_and(|position| position != next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress};

    use crate::memory::discard::Granularity;
    use crate::testing::GuestQueue;

    /// Of two granules that are in the balloon, one has a page that is not zero. Of those around them there is a part.
    #[test]
    fn a_sweep_gives_whole_granules_of_zeroes_back() {
        const PAGES: Range<u64> = 0x3ff..0x801;
        let guest = GuestQueue::new();
        let mut work = Work::default();
        work.balloon
            .set_memory(&guest.memory, Granularity::Bytes(2 << 20));
        work.balloon.inflate(&[PAGES], &mut work.pieces);
        work.pieces.clear();
        let blocks = || guest.file().metadata().unwrap().blocks();
        let before = blocks();
        for page in PAGES {
            let place = GuestAddress(page << 12);
            assert_eq!(guest.memory.read_obj::<u8>(place).unwrap(), 0);
        }
        guest
            .memory
            .write_obj(7_u8, GuestAddress(0x5ff << 12))
            .unwrap();
        let read = PAGES.end - PAGES.start;
        assert_eq!(blocks(), before + read * 8);

        let counters = Counters::default();
        let mut turns = 1;
        let discarded = loop {
            match work.sweep(&counters, Budget::spent()) {
                Some(discarded) => break discarded,
                None => turns += 1,
            }
        };
        assert_eq!((turns, discarded), (4, 2 << 20));
        assert_eq!(blocks(), before + (read - 512) * 8);
        assert_eq!(
            guest
                .memory
                .read_obj::<u8>(GuestAddress(0x5ff << 12))
                .unwrap(),
            7
        );
        assert!(work.sweep.is_none());
    }

    #[test]
    fn a_new_driver_is_told_by_its_index() {
        let work = |position| Work {
            position,
            ..Work::default()
        };
        assert!(work(None).is_new_driver(0));
        assert!(work(Some(7)).is_new_driver(0));
        assert!(work(Some(7)).is_new_driver(8));
        assert!(!work(Some(7)).is_new_driver(7));
        // The device itself is new, and has no state of an earlier driver.
        assert!(!work(None).is_new_driver(7));
    }
}
