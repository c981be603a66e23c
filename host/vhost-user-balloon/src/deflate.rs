// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Deflating: the guest takes pages back (specification, clause 5.5.6).
//!
//! There is nothing to do for the memory: the file gets a new page when the guest writes to it. On request
//! the memory is there before the buffer is used, so that a host without memory shows in the daemon's log
//! and the guest's first write does not have to wait.

use vm_memory::GuestMemoryMmap;

use crate::balloon::Balloon;
use crate::counters::{Counters, Refusal};
use crate::discard::{Discarder, Pieces};
use crate::pages::{Format, Pages};
use crate::queue::{Chain, Kind, Receiver};

/// What receives the messages of the deflate queue.
#[derive(Debug)]
pub struct Deflate<'a> {
    /// The guest's memory, where the messages are.
    pub memory: &'a GuestMemoryMmap,
    /// Where the pages come from.
    pub balloon: &'a mut Balloon,
    /// What has memory ready, if it is to be.
    pub prefault: Option<&'a mut Discarder>,
    /// What the messages are.
    pub format: Format,
    /// What is counted.
    pub counters: &'a Counters,
    /// Space for the pages of a batch.
    pub pages: &'a mut Pages,
    /// Space for the pieces of a batch.
    pub pieces: &'a mut Pieces,
}

impl Receiver for Deflate<'_> {
    fn take(&mut self, chain: Chain<'_>) -> bool {
        self.pages.read(
            self.format,
            Kind::Deflate,
            self.memory,
            chain,
            self.counters,
        )
    }

    fn finish(&mut self) {
        let tally = self.balloon.deflate(self.pages.sorted(), self.pieces);
        self.pages.clear();
        match &mut self.prefault {
            Some(discarder) => discarder.prefault(self.pieces),
            None => self.pieces.clear(),
        }
        tally.count(
            &self.counters.deflated,
            Refusal::NotInBalloon,
            self.counters,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Counter;
    use crate::discard::Granularity;
    use crate::queue::serve;
    use crate::testing::GuestQueue;

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
            prefault: None,
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
            &counters,
            &messages,
            &mut receiver,
        );
        assert_eq!(counters.deflated.get(), 4096);
        assert_eq!(counters.refused(Refusal::NotInBalloon), 1);
        assert_eq!(messages.get(), 2);
        assert_eq!(guest.used(), 2);
    }
}
