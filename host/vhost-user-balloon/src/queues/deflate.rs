// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Deflating (specification, clause 5.5.6).
//!
//! Most memory needs no work: the host allocates a page when the guest writes to it. If the host may be unable to
//! do so (huge pages, a full tmpfs), the VM would end then. So the device allocates such memory before it uses the
//! buffer. While the host has no memory the device delays the buffer, if the driver waits for it. With `--prefault`
//! it allocates all memory.

use vm_memory::GuestMemoryMmap;

use super::pages::{Format, Pages};
use super::virtqueue::{Chain, Progress, Receiver};
use crate::budget::Budget;
use crate::counters::{Counters, Refusal};
use crate::memory::balloon::{Balloon, Tally};
use crate::memory::discard::{Discarder, Pieces};
use crate::virtio::kind::Kind;

/// The receiver of the deflate queue.
#[derive(Debug)]
pub struct Deflate<'a> {
    /// The guest's memory, which contains the messages.
    pub memory: &'a GuestMemoryMmap,
    /// The balloon of the pages.
    pub balloon: &'a mut Balloon,
    /// Allocates memory.
    pub discarder: &'a mut Discarder,
    /// Whether to allocate all memory, and not only memory that the host may lack.
    pub prefault: bool,
    /// Whether the driver notifies the device before it reuses a page.
    pub told_before_use: bool,
    /// Whether another worker may have begun with the messages, so that some pages are already
    /// deflated.
    pub begun: bool,
    /// The format of the messages.
    pub format: Format,
    /// The counters.
    pub counters: &'a Counters,
    /// Space for the pages of a batch.
    pub pages: &'a mut Pages,
    /// Space for the pieces of a batch.
    pub pieces: &'a mut Pieces,
}

impl Receiver for Deflate<'_> {
    fn take(&mut self, chain: Chain<'_>, again: bool) -> bool {
        self.pages.read(
            self.format,
            Kind::Deflate,
            self.memory,
            chain,
            self.counters,
            again,
        )
    }

    fn finish(&mut self, done: &mut u64, budget: Budget) -> Progress {
        // Pages of removed memory may be in the balloon when the front end adds the memory again.
        let named = self.pages.sort(&self.balloon.known_ranges());
        // Pages that were listed twice, or are outside of memory, count once.
        let mut tally = if *done == 0 { named } else { Tally::default() };
        let mut progress = Progress::Done;
        for chunk in self.pages.chunks(*done) {
            if budget.is_over() {
                progress = Progress::More;
                break;
            }
            self.balloon.find(&chunk, self.pieces);
            let ready = self
                .discarder
                .prefault(self.pieces, self.prefault, self.counters);
            if !ready && self.told_before_use {
                progress = Progress::Blocked;
                break;
            }
            *done = chunk.end;
            tally.add(self.balloon.deflate(&[chunk]));
        }
        if progress == Progress::Done {
            self.balloon.write_down(self.pages.ranges());
        }
        self.pages.clear();
        if self.begun {
            tally.repeated = 0;
        }
        tally.count(
            &self.counters.deflated,
            Refusal::NotInBalloon,
            self.counters,
        );
        progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    use crate::counters::Counter;
    use crate::memory::discard::Granularity;
    use crate::queues::virtqueue::{Next, Unfinished, serve};
    use crate::testing::{GuestQueue, huge_file};

    #[test]
    fn pages_come_out_once() {
        let mut guest = GuestQueue::new();
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
        let mut pieces = Pieces::default();
        balloon.inflate(&[0x100..0x101, 0x101..0x102], &mut pieces);
        pieces.clear();

        guest.send(&[&[0, 1, 0, 0, 9, 9, 0, 0]]);
        guest.send(&[&[0, 1, 0, 0]]);
        let counters = Counters::default();
        let mut receiver = Deflate {
            memory: &guest.memory,
            balloon: &mut balloon,
            discarder: &mut Discarder::default(),
            prefault: false,
            told_before_use: false,
            begun: false,
            format: Format::Pfns,
            counters: &counters,
            pages: &mut Pages::default(),
            pieces: &mut pieces,
        };
        let messages = Counter::default();
        serve(
            &mut guest.vring(),
            &guest.memory,
            &mut Vec::new(),
            &mut Unfinished::default(),
            &counters,
            &messages,
            &mut receiver,
        );
        assert_eq!(counters.deflated.get(), 4096);
        assert_eq!(counters.refused(Refusal::NotInBalloon), 1);
        assert_eq!(messages.get(), 2);
        assert_eq!(guest.used(), 2);
    }

    #[test]
    fn a_driver_that_waits_gets_no_page_without_memory() {
        for (told_before_use, next, used) in [(true, Next::Later, 0), (false, Next::Notified, 1)] {
            let mut guest = GuestQueue::new();
            let (file, bytes) = huge_file();
            let region = GuestRegionMmap::from_range(
                GuestAddress(1 << 30),
                usize::try_from(bytes).unwrap(),
                Some(FileOffset::from_arc(file, 0)),
            );
            guest.memory = guest
                .memory
                .insert_region(Arc::new(region.unwrap()))
                .unwrap();
            let mut balloon = Balloon::default();
            balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
            balloon.inflate(
                &[0x40000..0x40001, 0x40001..0x40002],
                &mut Pieces::default(),
            );
            guest.send(&[&[0, 0, 4, 0, 1, 0, 4, 0]]);
            let (counters, result) = serve_waiting(&guest, &mut balloon, told_before_use);
            assert_eq!((result, guest.used()), (next, used));
            assert_eq!(counters.prefault_failures.get(), 1);
            let out = if told_before_use { 0 } else { 2 * 4096 };
            assert_eq!(counters.deflated.get(), out);
        }
    }

    /// Memory beyond the end of a sealed file can never be allocated, however long the driver
    /// waits.
    #[test]
    fn a_driver_does_not_wait_for_what_never_comes() {
        let mut guest = GuestQueue::new();
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
        balloon.inflate(&[0xefe..0xeff, 0xeff..0xf00], &mut Pieces::default());
        guest.file().set_len(0xeff << 12).unwrap();
        fcntl(guest.file(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        guest.send(&[&[0xfe, 0xe, 0, 0, 0xff, 0xe, 0, 0]]);
        let (counters, result) = serve_waiting(&guest, &mut balloon, true);
        assert_eq!((result, guest.used()), (Next::Notified, 1));
        assert_eq!(counters.prefault_failures.get(), 1);
        assert_eq!(counters.deflated.get(), 2 * 4096);
    }

    #[test]
    fn memory_is_there_before_the_buffer_is_used() {
        let mut guest = GuestQueue::new();
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(4096));
        balloon.inflate(&[0xefe..0xeff, 0xeff..0xf00], &mut Pieces::default());
        guest.send(&[&[0xfe, 0xe, 0, 0, 0xff, 0xe, 0, 0, 0, 0xf, 0, 0]]);
        let blocks = || guest.file().metadata().unwrap().blocks();
        let before = blocks();
        let (counters, result) = serve_waiting(&guest, &mut balloon, true);
        assert_eq!((result, guest.used()), (Next::Notified, 1));
        // The third page was not in the balloon. The used ring has two pages.
        assert_eq!(blocks(), before + (2 + 2) * 8);
        assert_eq!(counters.deflated.get(), 2 * 4096);
        assert_eq!(counters.refused(Refusal::NotInBalloon), 1);
    }

    fn serve_waiting(
        guest: &GuestQueue,
        balloon: &mut Balloon,
        told_before_use: bool,
    ) -> (Counters, Next) {
        let counters = Counters::default();
        let mut receiver = Deflate {
            memory: &guest.memory,
            balloon,
            discarder: &mut Discarder::default(),
            prefault: true,
            told_before_use,
            begun: false,
            format: Format::Pfns,
            counters: &counters,
            pages: &mut Pages::default(),
            pieces: &mut Pieces::default(),
        };
        let next = guest.serve(&counters, &mut receiver);
        (counters, next)
    }
}
