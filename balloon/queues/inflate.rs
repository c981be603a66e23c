// SPDX-License-Identifier: GPL-2.0

//! Inflating: allocates pages and sends them to the device.
//!
//! A page enters the balloon when the device has used the message that lists it. Until then the
//! message owns the page, and neither deflating nor page migration can see it.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        migration::{
            Migration,
            PendingMigrations, //
        },
        policy::liveness::Liveness, //
    },
    messages::message::{
        MessageQueue,
        Pages, //
    },
    rust::{
        mm::{
            balloon::balloon_pages::BalloonPages,
            pages::{
                batch::Batch,
                page::MAX_ORDER, //
            }, //
        },
        trace, //
    },
    sources::source::Source, //
};

use kernel::{
    error::code::EAGAIN,
    page::PAGE_SHIFT,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// How many blocks are collected before the first of them is sent: enough to merge adjacent blocks,
/// and few enough that the device does not run out of work.
const BLOCKS_PER_BATCH: usize = 1 << 16;

/// After how many pages to check how much the guest can spare: 8 MiB. A portion may be smaller, and
/// the check reads counters of all zones.
const PAGES_PER_CHECK: usize = 1 << (23 - PAGE_SHIFT);

/// The inflate queue. All numbers are kernel pages.
pub(crate) struct Inflate {
    pub(crate) queue: MessageQueue<Migration>,
    /// Pages in messages that the device has not used yet.
    in_flight: usize,
    /// The device's responses, by each look at the queue. A run of the task may take longer than a
    /// response counts, and the next run may find all buffers used before their interrupt comes.
    liveness: Liveness,
    has_just_responded: bool,
    /// The start of the clock.
    start: Instant<Monotonic>,
}

/// Why [`Inflate::fill`] stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All pages are in flight.
    Done,
    /// The queue is full, or nothing may be sent: continue when the device has used some messages.
    NotNow,
    /// The guest needs the rest of its memory.
    Reserve,
    /// The page allocator has no memory.
    NoMemory,
}

impl Inflate {
    /// Begins with an empty queue.
    pub(crate) fn new(queue: MessageQueue<Migration>) -> Self {
        Self {
            queue,
            in_flight: 0,
            liveness: Liveness::new(),
            has_just_responded: false,
            start: Instant::now(),
        }
    }

    /// Frees the pages of a device that was reset.
    pub(crate) fn detach_unused(&mut self) {
        self.in_flight = 0;
        drop(self.queue.detach_unused());
    }

    /// Returns how many pages the device has not acknowledged yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Returns whether the device had just used buffers at the latest [`collect`](Self::collect).
    pub(crate) fn has_just_responded(&self) -> bool {
        self.has_just_responded
    }

    /// Puts the acknowledged pages into `balloon`. Returns their number.
    pub(crate) fn collect(&mut self, balloon: &BalloonPages<PendingMigrations>) -> usize {
        let mut collected = 0;

        let used = self.queue.used();
        while let Some(pages) = self.queue.next_used() {
            match pages {
                Pages::List(pages) => {
                    collected += pages.len();
                    balloon.insert(pages);
                }
                Pages::Migrations(migrations) => balloon.replacer().acknowledged_new(migrations),
            }
        }

        let has_used = self.queue.used() != used;
        let now = self.start.elapsed().as_millis();
        self.has_just_responded = self.liveness.note(now, has_used, false);
        self.in_flight -= collected;
        collected
    }

    /// Takes up to `wanted` pages from `source`, sorts them in portions in `batch`, and sends them
    /// to the device, as long as `may_send` holds. Subtracts them from `wanted`. Checks at times
    /// how much the guest can spare, since processes allocate memory meanwhile. Puts pages that the
    /// device acknowledges into `balloon`.
    pub(crate) fn fill(
        &mut self,
        balloon: &BalloonPages<PendingMigrations>,
        batch: &mut Batch,
        mut source: impl Source,
        wanted: &mut usize,
        may_send: impl Fn() -> bool,
    ) -> Stop {
        let (at_once, in_flight) = source.limits();
        let unsplit = self.queue.has_page_sets();
        let (mut spare, mut unchecked) = (0, PAGES_PER_CHECK);

        while *wanted > 0 {
            let is_full = |this: &Self| this.queue.room() == 0 || this.in_flight >= in_flight;
            if is_full(self) && (self.collect(balloon) == 0 || is_full(self)) {
                self.queue.notify();
                return Stop::NotNow;
            }

            let room = self.queue.room_for_blocks();
            if unchecked >= PAGES_PER_CHECK {
                (spare, unchecked) = (source.spare(), 0);
            }
            let portion = at_once.min(*wanted).min(spare);
            if portion == 0 {
                self.queue.notify();
                return Stop::Reserve;
            }
            // A block may have to be split for the rest.
            let (portion, blocks) = match unsplit {
                true => (portion, room.max(1 << MAX_ORDER)),
                false => (portion.min(room), usize::MAX),
            };
            source.gather(batch, portion, blocks.min(BLOCKS_PER_BATCH), unsplit);
            let gathered = batch.pages();
            spare -= gathered;
            unchecked += gathered;

            // Checked after the allocation, since these may be pages that were deflated in the
            // meantime.
            let stop = match gathered {
                0 => Stop::NoMemory,
                _ if may_send() => self.send(batch),
                _ => Stop::NotNow,
            };
            *wanted -= gathered - batch.pages();
            if stop != Stop::Done {
                drop(batch.take_all());
                self.queue.notify();
                return stop;
            }
            if unsplit || at_once < usize::MAX {
                self.queue.notify();
            }
        }

        self.queue.notify();
        Stop::Done
    }

    /// Sends all pages in `batch`, as far as possible.
    fn send(&mut self, batch: &mut Batch) -> Stop {
        while batch.pages() > 0 {
            match self.queue.send_some(batch) {
                Ok(pages) => {
                    self.in_flight += pages;
                    trace::inflate(self.queue.device(), pages);
                }
                Err((_, EAGAIN)) => return Stop::NotNow,
                // Pages without a number in the protocol are useless, too.
                Err(_) => return Stop::NoMemory,
            }

            // The device reads these messages while the driver writes the next ones.
            if self.queue.is_notification_due() {
                self.queue.notify();
            }
        }

        Stop::Done
    }
}
