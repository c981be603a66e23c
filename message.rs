// SPDX-License-Identifier: GPL-2.0

//! The base protocol's messages: arrays of page frame numbers of balloon pages.
//!
//! Specification: clause 5.5.6, Device Operation.

#![forbid(unsafe_code)]

use crate::{
    migration::Move,
    rust::{
        page_list::PageList,
        virtio::ByteOrder,
        virtqueue::Virtqueue, //
    },
    target, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*, //
};

/// How many page frame numbers a message has at most.
///
/// The specification has no limit, but devices have: Firecracker passes over longer messages without a
/// word, so that the memory is lost to both sides, and Cloud Hypervisor refuses them. What would be gained
/// by longer messages is gained by sending many with each notification.
const PFNS_PER_MESSAGE: usize = 256;

/// How many kernel pages a message names at most.
pub(crate) const PAGES_PER_MESSAGE: usize = PFNS_PER_MESSAGE / target::BALLOON_PAGES_PER_PAGE;

/// How many arrays are kept for messages when there is nothing to tell, so that there is always one to be
/// had when memory is short.
const RESERVE: usize = 4;

/// What belongs to a message until the device has used it.
pub(crate) enum Pages {
    /// Pages that are nowhere else.
    List(PageList),
    /// Moves of pages within the balloon.
    Moves(KVec<Move>),
}

/// What a virtqueue for messages carries.
type Payload = (KVec<u32>, Pages);

/// A virtqueue for messages.
pub(crate) struct MessageQueue {
    vq: Virtqueue<Payload>,
    /// Arrays that are not in use.
    spare: KVec<KVec<u32>>,
    byte_order: ByteOrder,
    /// How many messages the device was not notified of.
    unannounced: usize,
}

impl MessageQueue {
    /// Begins with an empty queue.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(vq: Virtqueue<Payload>, byte_order: ByteOrder) -> Result<Self> {
        let mut spare = KVec::with_capacity(vq.room().max(RESERVE), GFP_KERNEL)?;

        for _ in 0..RESERVE {
            spare.push(
                KVec::with_capacity(PFNS_PER_MESSAGE, GFP_KERNEL)?,
                GFP_KERNEL,
            )?;
        }

        Ok(Self {
            vq,
            spare,
            byte_order,
            unannounced: 0,
        })
    }

    /// Returns how many more messages can be sent now.
    pub(crate) fn room(&self) -> usize {
        self.vq.room()
    }

    /// Returns how many messages the device has not used yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.vq.in_flight()
    }

    /// Returns an empty message. Does not sleep.
    pub(crate) fn message(&mut self) -> Option<Message> {
        let pfns = self
            .spare
            .pop()
            .or_else(|| KVec::with_capacity(PFNS_PER_MESSAGE, GFP_NOWAIT | __GFP_NOWARN).ok())?;

        Some(Message {
            pfns,
            byte_order: self.byte_order,
        })
    }

    /// Sends `message`. `pages` belong to it until the device has used it.
    ///
    /// # Errors
    ///
    /// Returns the pages, if the queue is full, broken, or gone.
    pub(crate) fn send(&mut self, message: Message, pages: Pages) -> Result<(), Pages> {
        match self.vq.add((message.pfns, pages)) {
            Ok(()) => {
                self.unannounced += 1;
                Ok(())
            }
            Err((array, pages)) => {
                self.keep(array);
                Err(pages)
            }
        }
    }

    /// Sends a message about one page of each of `moves`, which is what `pfn` returns.
    ///
    /// # Errors
    ///
    /// Returns the moves, if there is no room or no memory for a message.
    pub(crate) fn send_moves(
        &mut self,
        moves: KVec<Move>,
        pfn: impl Fn(&Move) -> u64,
    ) -> Result<(), KVec<Move>> {
        let Some(mut message) = self.message() else {
            return Err(moves);
        };

        // A message has room for as many as can be waiting, and all have names.
        let _ = message.name(moves.iter().map(pfn));

        match self.send(message, Pages::Moves(moves)) {
            Err(Pages::Moves(moves)) => Err(moves),
            _ => Ok(()),
        }
    }

    /// Returns how many messages the device was not notified of.
    pub(crate) fn unannounced(&self) -> usize {
        self.unannounced
    }

    /// Notifies the device of what was sent: once, however much it is.
    pub(crate) fn notify(&mut self) {
        if self.unannounced > 0 {
            self.vq.kick();
            self.unannounced = 0;
        }
    }

    /// Returns the pages of the next message that the device has used.
    pub(crate) fn next_used(&mut self) -> Option<Pages> {
        let ((array, pages), _) = self.vq.next_used()?;

        self.keep(array);
        Some(pages)
    }

    fn keep(&mut self, mut array: KVec<u32>) {
        array.clear();

        // There is room for as many as there can be messages; if there were not, it would just be freed.
        let _ = self.spare.push_within_capacity(array);
    }

    /// Says that no interrupts are needed until [`sleep`](Self::sleep).
    pub(crate) fn wake(&mut self) {
        self.vq.disable_callback();
    }

    /// Asks to be woken when the device has used most of what it has. Returns false if it has already.
    #[must_use]
    pub(crate) fn sleep(&mut self) -> bool {
        if self.in_flight() == 0 {
            self.spare.truncate(RESERVE);
        }

        self.vq.enable_callback_delayed()
    }

    /// Returns whether the queue will never work again.
    pub(crate) fn is_broken(&self) -> bool {
        self.vq.is_broken()
    }
}

/// A message that is being written.
pub(crate) struct Message {
    /// In the device's byte order. Never grows beyond its capacity: this is no place to allocate.
    pfns: KVec<u32>,
    byte_order: ByteOrder,
}

impl Message {
    /// Returns how many more kernel pages can be named.
    pub(crate) fn room(&self) -> usize {
        PFNS_PER_MESSAGE.saturating_sub(self.pfns.len()) / target::BALLOON_PAGES_PER_PAGE
    }

    /// Names the kernel pages `pfns`.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` if a page has no name in the base protocol, `ENOSPC` if there are more than there is
    /// [`room`](Self::room) for. Some of the pages have been named then.
    pub(crate) fn name(&mut self, pfns: impl Iterator<Item = u64>) -> Result {
        for pfn in pfns {
            for balloon_pfn in target::balloon_pfns(pfn)? {
                self.pfns
                    .push_within_capacity(self.byte_order.to_device32(balloon_pfn))
                    .map_err(|_| ENOSPC)?;
            }
        }

        Ok(())
    }
}
