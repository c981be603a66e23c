// SPDX-License-Identifier: GPL-2.0

//! Inflating: pages go from the page allocator to the device.
//!
//! A page counts as being in the balloon when the device has used the message that names it. Until then it
//! belongs to the message, and nothing can take it back: neither deflating nor compaction knows of it.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation.

#![forbid(unsafe_code)]

use crate::{
    message::{
        MessageQueue,
        Pages,
        PAGES_PER_MESSAGE, //
    },
    migration::Moves,
    rust::{
        balloon_pages::BalloonPages,
        page_list::{
            self,
            PageList, //
        }, //
    }, //
};

/// How many messages are sent with one notification: few enough to keep both sides busy, and enough to make
/// the cost of a notification, which takes the virtual CPU out of the guest, one among thousands of pages.
const MESSAGES_PER_NOTIFICATION: usize = 32;

/// The inflate queue. All numbers are kernel pages.
pub(crate) struct Inflate {
    pub(crate) queue: MessageQueue,
    /// Pages in messages that the device has not used yet.
    in_flight: usize,
}

/// Why [`Inflate::fill`] stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All pages are on their way.
    Done,
    /// The queue is full, or nothing may be sent: go on when the device has used some messages.
    NotNow,
    /// The page allocator has nothing to give.
    NoMemory,
}

impl Inflate {
    /// Begins with an empty queue.
    pub(crate) fn new(queue: MessageQueue) -> Self {
        Self {
            queue,
            in_flight: 0,
        }
    }

    /// Returns how many pages the device has not answered for yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts the pages that the device has answered for into `balloon`. Returns how many there were.
    pub(crate) fn collect(&mut self, balloon: &BalloonPages<Moves>) -> usize {
        let mut collected = 0;

        while let Some(pages) = self.queue.next_used() {
            match pages {
                Pages::List(pages) => {
                    collected += pages.len();
                    balloon.insert(pages);
                }
                Pages::Moves(moves) => balloon.replacer().told_new(moves),
            }
        }

        self.in_flight -= collected;
        collected
    }

    /// Takes up to `wanted` pages from the page allocator and sends them to the device, as long as `may_send`
    /// holds. What it has answered in the meantime is put into `balloon`.
    pub(crate) fn fill(
        &mut self,
        balloon: &BalloonPages<Moves>,
        wanted: usize,
        may_send: impl Fn() -> bool,
    ) -> Stop {
        let stop = self.send(balloon, wanted, may_send);

        self.queue.notify();
        stop
    }

    fn send(
        &mut self,
        balloon: &BalloonPages<Moves>,
        mut wanted: usize,
        may_send: impl Fn() -> bool,
    ) -> Stop {
        // Once a block of some order is not to be had, larger ones are not tried again in this call.
        let mut order = page_list::MAX_ORDER;

        while wanted > 0 {
            if self.queue.room() == 0 && self.collect(balloon) == 0 {
                return Stop::NotNow;
            }

            let pages = allocate(wanted.min(PAGES_PER_MESSAGE), &mut order);
            let n = pages.len();
            if n == 0 {
                return Stop::NoMemory;
            }

            // Asked now, and not before: pages that were deflated by then may be among these.
            if !may_send() {
                return Stop::NotNow;
            }

            let Some(mut message) = self.queue.message() else {
                return Stop::NoMemory;
            };

            // Pages that the base protocol cannot name are of no use. They go back when they are dropped.
            if message.name(pages.pfns()).is_err() {
                return Stop::NoMemory;
            }

            if self.queue.send(message, Pages::List(pages)).is_err() {
                return Stop::NotNow;
            }

            self.in_flight += n;
            wanted -= n;

            // The device reads these while the next ones are written.
            if self.queue.unannounced() == MESSAGES_PER_NOTIFICATION {
                self.queue.notify();
            }
        }

        Stop::Done
    }
}

/// Allocates up to `wanted` pages in blocks of up to 2^`order` pages.
///
/// Blocks are much cheaper to get than single pages, and leave fewer holes. When there is none, `order` is
/// lowered.
fn allocate(wanted: usize, order: &mut u32) -> PageList {
    let mut pages = PageList::new();

    while let Some(largest) = (wanted - pages.len()).checked_ilog2() {
        let try_order = largest.min(*order);

        if !pages.alloc_block(try_order) {
            let Some(smaller) = try_order.checked_sub(1) else {
                break;
            };
            *order = smaller;
        }
    }

    pages
}
