// SPDX-License-Identifier: GPL-2.0

//! Deflating: pages go from the balloon back to the page allocator.
//!
//! With page sets, and where the device insists on it (`VIRTIO_BALLOON_F_MUST_TELL_HOST`), pages
//! are free when it has answered. Else they are free at once, as they are with page sets when the
//! guest has run out of memory, and the device learns of it whenever it gets round to it. What it
//! has to learn is noted in pages that were in the balloon themselves, so that this path neither
//! allocates nor waits.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation; docs/protocol.md, PS-D14.

#![forbid(unsafe_code)]

use crate::{
    balloon::migration::{
        Migration,
        MigrationGuard,
        PendingMigrations, //
    },
    messages::{
        message::{
            MessageQueue,
            Pages,
            Payload, //
        },
        negotiated::Negotiated, //
    },
    rust::{
        mm::{
            balloon::balloon_pages::BalloonPages,
            pages::{
                batch::Batch,
                page::MAX_ORDER,
                page_list::PageList,
                range_stack::RangeStack, //
            }, //
        },
        trace::{
            self,
            Reason, //
        }, //
    }, //
};

use core::ops::Range;
use kernel::{
    prelude::*,
    sync::SpinLock, //
};

/// How many blocks or pages are gathered before the first of them is sent.
const BLOCKS_PER_BATCH: usize = 1 << 16;

/// The deflate queue.
pub(crate) struct Deflate {
    pub(crate) queue: MessageQueue<Migration>,
    terms: Negotiated,
    /// Kernel pages that are free when the device has answered.
    leaving: usize,
    /// What the device has to be told when the queue has room again.
    backlog: RangeStack,
}

impl Deflate {
    /// Begins with an empty queue.
    pub(crate) fn new(queue: MessageQueue<Migration>, terms: Negotiated) -> Self {
        Self {
            queue,
            terms,
            leaving: 0,
            backlog: RangeStack::new(),
        }
    }

    /// Returns how many kernel pages are neither in the balloon nor free.
    pub(crate) fn leaving(&self) -> usize {
        self.leaving
    }

    /// Returns whether the device has not heard, or not answered, of everything yet.
    pub(crate) fn is_pending(&self) -> bool {
        !self.backlog.is_empty() || self.queue.in_flight() > 0
    }

    /// Forgets what the device has not been told yet. For when it is about to be reset.
    pub(crate) fn forget(&mut self) {
        self.backlog = RangeStack::new();
    }

    /// Takes back what a device has that was reset. It has to be dropped without a spinlock.
    pub(crate) fn detach_unused(&mut self) -> KVec<Option<Payload<Migration>>> {
        self.forget();
        self.leaving = 0;
        self.queue.detach_unused()
    }

    /// Sends one message about pages in the backlog. Returns whether there may be another one.
    fn send_next(&mut self) -> bool {
        if self.queue.room() == 0 || self.backlog.is_empty() {
            return false;
        }
        // Whatever was in the balloon has a name.
        let Ok(message) = self.queue.write(&mut self.backlog) else {
            return false;
        };

        // If the queue does not take it although there is room, there is nobody left to tell.
        self.queue
            .send(message, Pages::List(PageList::new()))
            .is_ok()
    }
}

/// Tells the device as much of what it has to know as the queue has room for: one message under each
/// hold of the lock.
pub(crate) fn send_backlog(deflate: &SpinLock<Deflate>) {
    while deflate.lock().send_next() {}

    deflate.lock().queue.notify();
}

/// Takes note of what the device has answered. Returns the number of answers.
pub(crate) fn collect(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
) -> usize {
    let mut answers = 0;

    loop {
        let Some(pages) = deflate.lock().queue.next_used() else {
            return answers;
        };

        // Where the device had to be told first, this is where the pages are freed: not under the
        // lock.
        match pages {
            Pages::List(pages) => {
                let freed = pages.len();

                drop(pages);
                deflate.lock().leaving -= freed;
            }
            Pages::PendingMigrations(migrations) => balloon.replacer().acknowledged_old(migrations),
        }
        answers += 1;
    }
}

/// Takes pages out of a balloon, except those that the device may not know of yet.
struct Dequeue<'a> {
    balloon: &'a BalloonPages<PendingMigrations>,
    guard: &'a MigrationGuard<'a>,
    /// Whether only nodes that are short of memory get some.
    where_needed: bool,
    /// These, of which there are as many as migrations. They have to go back.
    unknown: PageList,
}

impl Dequeue<'_> {
    /// Like [`BalloonPages::take`].
    fn take(&mut self, max: usize, max_blocks: usize) -> PageList {
        loop {
            let mut pages = self.balloon.take(max, max_blocks, self.where_needed);
            let taken = pages.len();

            self.guard
                .split_off_unacknowledged(&mut pages, &mut self.unknown);
            if taken == 0 || !pages.is_empty() {
                return pages;
            }
        }
    }
}

/// Takes up to `wanted` pages (kernel pages) out of `balloon`, and frees them as soon as the device
/// allows it. Returns how many were taken out: fewer if nothing more can be done before the device
/// has answered.
///
/// The device learns of it by [`send_backlog`]. It has to know of the pages' arrival before: those
/// of which it does not stay in the balloon, and `guard` keeps others from becoming such. `batch` is
/// where pages are put in order.
pub(crate) fn release(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
    batch: &mut Batch,
    wanted: usize,
    reason: Reason,
    guard: &MigrationGuard<'_>,
) -> usize {
    let terms = deflate.lock().terms;
    let notify_first = match reason {
        Reason::Target | Reason::GoingOffline => terms.notify_first(),
        Reason::OutOfMemory => terms.notify_first_out_of_memory(),
    };
    let mut dequeue = Dequeue {
        balloon,
        guard,
        where_needed: matches!(reason, Reason::OutOfMemory),
        unknown: PageList::new(),
    };
    let mut released = 0;

    while released < wanted {
        let some = wanted - released;

        match if notify_first {
            gather(deflate, &mut dequeue, batch, some);
            tell(deflate, balloon, batch)
        } else {
            free_first(deflate, &mut dequeue, some)
        } {
            0 => break,
            n => released += n,
        }
    }

    balloon.insert(dequeue.unknown);
    trace(deflate, released, reason);
    released
}

/// Takes the blocks in `pfns` out of `balloon`, which are freed when the device has answered.
/// Returns whether it could be told of all.
pub(crate) fn evacuate(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
    batch: &mut Batch,
    pfns: &Range<u64>,
) -> bool {
    let mut blocks = balloon.take_blocks(pfns);
    let mut all = true;
    let mut told = 0;

    while all && !blocks.is_empty() {
        batch.add(&mut blocks);
        let pages = batch.pages();
        let told_now = tell(deflate, balloon, batch);
        told += told_now;
        all = told_now == pages;
    }

    balloon.insert(blocks);
    trace(deflate, told, Reason::GoingOffline);
    all
}

/// Traces that `pages` kernel pages left the balloon, if there are any.
fn trace(deflate: &SpinLock<Deflate>, pages: usize, reason: Reason) {
    if pages > 0 {
        let device = deflate.lock().queue.device();
        trace::deflate(device, pages, reason);
    }
}

/// Returns whether pages that are released because memory ran out can be used only when the device has
/// answered.
pub(crate) fn is_awaited_out_of_memory(deflate: &SpinLock<Deflate>) -> bool {
    deflate.lock().terms.notify_first_out_of_memory()
}

/// Returns whether the device knows of all that has left the balloon, after it was told as much as
/// it can be now.
pub(crate) fn is_answered(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
) -> bool {
    send_backlog(deflate);
    collect(deflate, balloon);
    !deflate.lock().is_pending()
}

/// Frees some pages, up to `wanted`, before the device has been told.
fn free_first(deflate: &SpinLock<Deflate>, dequeue: &mut Dequeue<'_>, wanted: usize) -> usize {
    // All of them are noted under one hold of the lock.
    let mut pages = dequeue.take(wanted.min(1 << MAX_ORDER), usize::MAX);
    let taken = pages.len();

    // What is noted in pages has to be freed page by page.
    pages.split_blocks();
    deflate.lock().backlog.record(&mut pages);
    taken
}

/// Fills `batch` with up to `wanted` pages, if the device can be told of them.
fn gather(
    deflate: &SpinLock<Deflate>,
    dequeue: &mut Dequeue<'_>,
    batch: &mut Batch,
    wanted: usize,
) {
    let blocks = deflate.lock().queue.room_for_blocks();

    while batch.pages() < wanted && batch.blocks() < blocks.min(BLOCKS_PER_BATCH) {
        let mut pages = dequeue.take(wanted - batch.pages(), blocks - batch.blocks());
        if pages.is_empty() {
            break;
        }

        batch.add(&mut pages);
        if !pages.is_empty() {
            dequeue.balloon.insert(pages);
            break;
        }
    }
}

/// Tells the device of what is in `batch`, which is freed when it has answered. Returns how many
/// pages it could be told of; the others stay in the balloon.
fn tell(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
    batch: &mut Batch,
) -> usize {
    let mut told = 0;

    while batch.pages() > 0 {
        let draft = deflate.lock().queue.draft();
        // A message may name thousands of blocks or pages: it is written without the lock.
        let written = draft.map(|draft| draft.write(batch));
        let sent = {
            let mut this = deflate.lock();
            let sent = this.queue.send_written(written);

            this.leaving += sent.as_ref().map_or(0, |pages| *pages);
            sent
        };

        match sent {
            Ok(pages) => told += pages,
            Err((pages, _)) => {
                balloon.insert(pages);
                balloon.insert(batch.take_all());
            }
        }
    }

    told
}
