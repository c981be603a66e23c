// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inflating (specification, clause 5.5.6).
//!
//! The device may change a page only after it has seen the page on the queue, and until it uses the buffer
//! that lists it. So it punches all holes for the messages of a batch before it uses the first of them.
//! Pages of several messages of a batch can share a hole.

use balloon_wire::status::Status;
use vm_memory::GuestMemoryMmap;

use super::pages::{Format, Pages};
use super::virtqueue::{Chain, Progress, Receiver};
use crate::budget::Budget;
use crate::counters::{Counters, Refusal};
use crate::memory::balloon::{Balloon, Tally};
use crate::memory::discard::{Discarder, Pieces};
use crate::virtio::kind::Kind;

/// The receiver of the inflate queue.
pub struct Inflate<'a> {
    /// The guest's memory, which contains the messages.
    pub memory: &'a GuestMemoryMmap,
    /// The balloon for the pages.
    pub balloon: &'a mut Balloon,
    /// Whether the driver notifies the device before it reuses a page.
    pub told_before_use: bool,
    /// Whether another worker may have begun with the messages, so that some pages are already in
    /// the balloon.
    pub begun: bool,
    /// Returns the pages to the host.
    pub discarder: &'a mut Discarder,
    /// The format of the messages.
    pub format: Format,
    /// The counters.
    pub counters: &'a Counters,
    /// Space for the pages of a batch.
    pub pages: &'a mut Pages,
    /// Space for the pieces of a batch.
    pub pieces: &'a mut Pieces,
    /// Called with a status of the driver before its buffer is used: then the driver may reset the device.
    pub report: &'a dyn Fn(Status),
}

impl Receiver for Inflate<'_> {
    fn take(&mut self, chain: Chain<'_>, again: bool) -> bool {
        self.counters.translating.time(|| {
            self.pages.read(
                self.format,
                Kind::Inflate,
                self.memory,
                chain,
                self.counters,
                again,
            )
        })
    }

    fn finish(&mut self, done: &mut u64, budget: Budget) -> Progress {
        let translating = &self.counters.translating;
        let named = translating.time(|| self.pages.sort(&self.balloon.memory_ranges()));
        // Pages that were listed twice, or are outside of memory, count once.
        let mut tally = if *done == 0 { named } else { Tally::default() };
        let mut progress = Progress::Done;
        for chunk in self.pages.chunks(*done) {
            if budget.is_over() {
                progress = Progress::More;
                break;
            }
            *done = chunk.end;
            tally.add(translating.time(|| self.balloon.inflate(&[chunk], self.pieces)));
            self.discarder
                .discard(self.pieces, self.counters, &mut 0, Budget::UNLIMITED);
        }
        if progress == Progress::Done {
            self.balloon.write_down(self.pages.ranges());
            if let Some(status) = self.pages.status() {
                self.balloon.write_status_down(status);
                (self.report)(status);
            }
        }
        self.pages.clear();
        if progress == Progress::Done && !self.told_before_use {
            self.balloon.settle();
        }
        if self.begun {
            tally.repeated = 0;
        }
        tally.count(
            &self.counters.inflated,
            Refusal::AlreadyInBalloon,
            self.counters,
        );
        progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::discard::Granularity;
    use crate::testing::GuestQueue;
    use vm_memory::{Bytes, GuestAddress};

    /// Handles the messages of the queue, and returns the counters.
    fn run(guest: &GuestQueue, balloon: &mut Balloon) -> Counters {
        let counters = Counters::default();
        let mut receiver = Inflate {
            memory: &guest.memory,
            balloon,
            told_before_use: true,
            begun: false,
            discarder: &mut Discarder::default(),
            format: Format::Pfns,
            counters: &counters,
            pages: &mut Pages::default(),
            pieces: &mut Pieces::default(),
            report: &|_| {},
        };
        guest.serve(&counters, &mut receiver);
        counters
    }

    fn guest() -> (GuestQueue, Balloon) {
        let guest = GuestQueue::new();
        guest
            .memory
            .write_slice(&[1; 8 * 4096], GuestAddress(1 << 20))
            .unwrap();
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
        (guest, balloon)
    }

    fn page(guest: &GuestQueue, pfn: u64) -> u8 {
        guest.memory.read_obj(GuestAddress(pfn * 4096)).unwrap()
    }

    #[test]
    fn messages_of_a_batch_share_a_hole() {
        let (mut guest, mut balloon) = guest();
        guest.send(&[&[0x03, 1, 0, 0, 0x02, 1], &[0, 0, 0x01, 1, 0, 0]]);
        guest.send(&[&[0x00, 1, 0, 0]]);
        let counters = run(&guest, &mut balloon);
        assert_eq!(counters.discards.get(), 1);
        assert_eq!(counters.inflated.get(), 4 * 4096);
        assert_eq!([0xff, 0x104].map(|pfn| page(&guest, pfn)), [0, 1]);
        assert_eq!(
            [0x100, 0x101, 0x102, 0x103].map(|pfn| page(&guest, pfn)),
            [0; 4]
        );
        assert_eq!(guest.used(), 2);
    }

    /// Each turn reads the messages before it acts on them.
    #[test]
    fn few_long_messages_are_a_batch() {
        let (mut guest, mut balloon) = guest();
        let pfns: Vec<u8> = (0_u32..64 << 10)
            .flat_map(|number| (0x100 + number % 1024).to_le_bytes())
            .collect();
        for _ in 0..6 {
            guest.send(&[&pfns]);
        }
        run(&guest, &mut balloon);
        assert_eq!(guest.used(), 4);
    }

    #[test]
    fn a_page_is_punched_once() {
        let (mut guest, mut balloon) = guest();
        guest.send(&[&[0, 1, 0, 0]]);
        run(&guest, &mut balloon);
        guest.memory.write_obj(7_u8, GuestAddress(1 << 20)).unwrap();
        guest.send(&[&[0, 1, 0, 0]]);
        let counters = run(&guest, &mut balloon);
        assert_eq!(counters.refused(Refusal::AlreadyInBalloon), 1);
        assert_eq!(counters.discards.get(), 0);
        assert_eq!(page(&guest, 0x100), 7);
        assert_eq!(guest.used(), 2);
    }

    #[test]
    fn what_is_no_list_of_pages_is_refused() {
        let (mut guest, mut balloon) = guest();
        guest.send(&[&[0, 1, 0, 0, 1]]);
        guest.send(&[&[]]);
        guest.send(&[&[0xff, 0xff, 0xff, 0xff]]);
        let counters = run(&guest, &mut balloon);
        assert_eq!(counters.refused(Refusal::Truncated), 2);
        assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
        assert_eq!(counters.discards.get(), 0);
        assert_eq!(page(&guest, 0x100), 1);
        assert_eq!(guest.used(), 3);
    }
}
