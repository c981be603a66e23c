// SPDX-License-Identifier: GPL-2.0

//! Inflating: pages go from the page allocator to the device.
//!
//! A page counts as being in the balloon when the device has used the message that names it. Until
//! then it belongs to the message, and nothing can take it back: neither deflating nor compaction
//! knows of it.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation.

#![forbid(unsafe_code)]

use crate::{
    balloon::migration::Moves,
    messages::message::{
        MessageQueue,
        Pages, //
    },
    rust::{
        mm::{
            balloon_pages::BalloonPages,
            batch::{
                AllocError,
                Batch, //
            },
            memory,
            page_list::MAX_ORDER, //
        },
        trace,
        work::task::Job, //
    },
    sources::memory_blocks::Taker, //
};

use kernel::{
    error::code::EAGAIN,
    page::PAGE_SHIFT, //
};

/// How many messages are sent with one notification: few enough to keep both sides busy, and enough
/// to make the cost of a notification, which takes the virtual CPU out of the guest, one among
/// thousands of pages.
const MESSAGES_PER_NOTIFICATION: usize = 16;

/// How many blocks are gathered before the first of them is sent: enough to find neighbours, and
/// few enough for the device not to run out of work.
const BLOCKS_PER_BATCH: usize = 1 << 16;

/// How many kernel pages are allocated at a time, and how many the device may have, where the
/// kernel writes to what it allocates: 4 and 16 MiB. So much more of the host's memory does the
/// guest take, at most, to give it back; and the device is at work while more is written to.
const ZEROED_PORTION: usize = 1 << (22 - PAGE_SHIFT);
const ZEROED_IN_FLIGHT: usize = 4 * ZEROED_PORTION;

/// The inflate queue. All numbers are kernel pages.
pub(crate) struct Inflate {
    pub(crate) queue: MessageQueue,
    /// Pages in messages that the device has not used yet.
    in_flight: usize,
}

/// What is asked for next.
#[derive(Clone, Copy)]
struct Kind {
    order: u32,
    /// Whether the block stays one.
    whole: bool,
}

impl Kind {
    /// Returns what comes first.
    fn first(whole: bool) -> Self {
        Self {
            order: MAX_ORDER,
            whole,
        }
    }

    /// Returns what this becomes where no more than `pages` kernel pages are wanted. `None` if
    /// there are none.
    fn up_to(self, pages: usize) -> Option<Self> {
        let order = self.order.min(pages.checked_ilog2()?);

        Some(Self {
            order,
            whole: self.whole && order >= memory::page_block_order(),
        })
    }

    /// Returns what comes next when there is no such block: smaller ones, and after the smallest
    /// that may stay whole single pages, which may come from everywhere. `None` after a single page.
    fn next(self) -> Option<Self> {
        if self.whole && self.order <= memory::page_block_order() {
            return Some(Self::first(false));
        }

        Some(Self {
            order: self.order.checked_sub(1)?,
            ..self
        })
    }

    /// Returns how many blocks such a block becomes.
    fn blocks(self) -> usize {
        if self.whole {
            1
        } else {
            1 << self.order
        }
    }
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

    /// Frees what a device has that was reset.
    pub(crate) fn take_back(&mut self) {
        self.in_flight = 0;
        drop(self.queue.take_back());
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

    /// Takes up to `wanted` pages from `source`, in portions that go through `batch`, and sends them
    /// to the device, as long as `may_send` holds. What it has answered in the meantime is put into
    /// `balloon`.
    pub(crate) fn fill(
        &mut self,
        balloon: &BalloonPages<Moves>,
        batch: &mut Batch,
        mut source: impl Source,
        mut wanted: usize,
        may_send: impl Fn() -> bool,
    ) -> Stop {
        let (at_once, in_flight) = source.limits();
        let whole = self.queue.has_page_sets();

        while wanted > 0 {
            let is_full = |this: &Self| this.queue.room() == 0 || this.in_flight >= in_flight;
            if is_full(self) && (self.collect(balloon) == 0 || is_full(self)) {
                self.queue.notify();
                return Stop::NotNow;
            }

            let room = self.queue.room_for_blocks();
            let portion = at_once.min(wanted);
            // A block may have to be split, and none is worth being left for that.
            let (portion, blocks) = match whole {
                true => (portion, room.max(1 << MAX_ORDER)),
                false => (portion.min(room), usize::MAX),
            };
            source.gather(batch, portion, blocks.min(BLOCKS_PER_BATCH), whole);
            wanted -= batch.pages();

            // Asked now, and not before: pages that were deflated by then may be among these.
            let stop = match batch.pages() {
                0 => Stop::NoMemory,
                _ if may_send() => self.send(batch),
                _ => Stop::NotNow,
            };
            if stop != Stop::Done {
                drop(batch.take_all());
                self.queue.notify();
                return stop;
            }
            if whole || at_once < usize::MAX {
                self.queue.notify();
            }
        }

        self.queue.notify();
        Stop::Done
    }

    /// Sends all that is in `batch`, unless something keeps it from that.
    fn send(&mut self, batch: &mut Batch) -> Stop {
        while batch.pages() > 0 {
            match self.queue.send_some(batch) {
                Ok(pages) => {
                    self.in_flight += pages;
                    trace::inflate(self.queue.device(), pages);
                }
                Err((_, EAGAIN)) => return Stop::NotNow,
                // Pages that the protocol cannot name are of no use either.
                Err(_) => return Stop::NoMemory,
            }

            // The device reads these while the next ones are written.
            if self.queue.unannounced() == MESSAGES_PER_NOTIFICATION {
                self.queue.notify();
            }
        }

        Stop::Done
    }
}

/// Where pages for the balloon come from.
pub(crate) trait Source {
    /// Returns how many kernel pages are taken at a time, and from how many on that the device has
    /// not answered for no more are taken.
    fn limits(&self) -> (usize, usize) {
        (usize::MAX, usize::MAX)
    }

    /// Puts up to `wanted` pages into `batch`, in blocks that stay whole if they may and `whole` is
    /// set, until there might be more than `blocks` of them.
    fn gather(&mut self, batch: &mut Batch, wanted: usize, blocks: usize, whole: bool);
}

/// The page allocator.
pub(crate) struct PageAllocator {
    /// What is tried next: nothing that was not available is tried again. `None` before the first
    /// try.
    kind: Option<Kind>,
}

impl PageAllocator {
    /// Begins with the largest blocks.
    pub(crate) fn new() -> Self {
        Self { kind: None }
    }
}

impl Source for PageAllocator {
    fn limits(&self) -> (usize, usize) {
        match memory::is_zeroed_on_allocation() {
            true => (ZEROED_PORTION, ZEROED_IN_FLIGHT),
            false => (usize::MAX, usize::MAX),
        }
    }

    /// Blocks are much cheaper to get than single pages, and leave fewer holes. When there is none
    /// of a kind, the next kind is tried.
    fn gather(&mut self, batch: &mut Batch, wanted: usize, blocks: usize, whole: bool) {
        let kind = self.kind.get_or_insert(Kind::first(whole));

        while let Some(this) = kind.up_to(wanted - batch.pages()) {
            if batch.blocks() + this.blocks() > blocks {
                break;
            }

            match batch.alloc(this.order, wanted - batch.pages(), this.whole) {
                Ok(()) => (),
                Err(AllocError::Full) => break,
                Err(AllocError::NoBlock) => {
                    let Some(next) = this.next() else {
                        break;
                    };
                    *kind = next;
                }
            }
        }
    }
}

impl<S: Job> Source for &Taker<S> {
    fn gather(&mut self, batch: &mut Batch, wanted: usize, _blocks: usize, whole: bool) {
        let mut pages = self.take_over(wanted);

        if !whole {
            pages.split_blocks();
        }
        // What there is no room for goes back.
        batch.add(&mut pages);
    }
}
