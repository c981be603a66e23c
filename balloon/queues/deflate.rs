// SPDX-License-Identifier: GPL-2.0

//! Deflating: pages return from the balloon to the page allocator.
//!
//! With page sets, and with `VIRTIO_BALLOON_F_MUST_TELL_HOST`, pages are free when the device has
//! used their message. Otherwise, and with page sets when the guest has run out of memory, they are
//! free at once, and the driver notifies the device later. It stores the ranges to report in some
//! of the pages themselves, so that this path neither allocates nor waits.
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
            node::NodeSet,
            pages::{
                batch::Batch,
                page::MAX_ORDER,
                page_list::PageList,
                range_stack::RangeStack, //
            },
        },
        trace::{
            self,
            Reason, //
        }, //
    }, //
};

use core::mem;
use kernel::{
    prelude::*,
    sync::SpinLock, //
};

/// How many blocks or pages are collected before the first of them is sent.
const BLOCKS_PER_BATCH: usize = 1 << 16;

/// How many kernel pages are recorded under one hold of the lock.
const PAGES_PER_HOLD: usize = 512;

/// The deflate queue.
pub(crate) struct Deflate {
    pub(crate) queue: MessageQueue<Migration>,
    terms: Negotiated,
    /// Kernel pages that are free when the device has used their message.
    leaving: usize,
    /// The ranges to report when the queue has room again.
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

    /// Returns whether there are unreported pages, or messages that the device has not used.
    pub(crate) fn is_pending(&self) -> bool {
        !self.backlog.is_empty() || self.queue.in_flight() > 0
    }

    /// Discards unreported pages. For when the device is about to be reset. The result must be
    /// dropped without a spinlock.
    pub(crate) fn forget(&mut self) -> RangeStack {
        mem::replace(&mut self.backlog, RangeStack::new())
    }

    /// Takes back the buffers of a device that was reset, and discards unreported pages. The result
    /// must be dropped without a spinlock.
    pub(crate) fn detach_unused(&mut self) -> (RangeStack, KVec<Option<Payload<Migration>>>) {
        let unused = self.queue.detach_unused();
        let pages = unused.iter().flatten().map(|(_, pages)| match pages {
            Pages::List(pages) => pages.len(),
            Pages::Migrations(_) => 0,
        });

        // An OOM notifier may still be freeing others.
        self.leaving -= pages.sum::<usize>();
        (self.forget(), unused)
    }

    /// Sends one message about pages in the backlog. Returns whether there may be another one.
    fn send_next(&mut self) -> bool {
        if self.queue.room() == 0 || self.backlog.is_empty() {
            return false;
        }
        // All pages of the balloon have a number in the protocol.
        let Ok(message) = self.queue.write(&mut self.backlog) else {
            return false;
        };

        // If the queue refuses a message although it has room, there is no device any more.
        self.queue
            .send(message, Pages::List(PageList::new()))
            .is_ok()
    }
}

/// Reports as much of the backlog as the queue has room for: one message under each hold of the
/// lock.
pub(crate) fn send_backlog(deflate: &SpinLock<Deflate>) {
    while deflate.lock().send_next() {}

    deflate.lock().queue.notify();
}

/// Frees the buffers beyond the reserve: each without the lock.
pub(crate) fn free_surplus(deflate: &SpinLock<Deflate>) {
    loop {
        let surplus = deflate.lock().queue.take_surplus();
        if surplus.is_none() {
            return;
        }
    }
}

/// Takes the used messages. Returns their number.
pub(crate) fn collect(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
) -> usize {
    let mut answers = 0;

    loop {
        let Some(pages) = deflate.lock().queue.next_used() else {
            return answers;
        };

        // If the device had to be notified first, the pages are freed here, without the lock.
        match pages {
            Pages::List(pages) => {
                let freed = pages.len();

                drop(pages);
                deflate.lock().leaving -= freed;
            }
            Pages::Migrations(migrations) => balloon.replacer().acknowledged_old(migrations),
        }
        answers += 1;
    }
}

/// Takes pages out of a balloon, except those that the device may not know yet.
struct Dequeue<'a> {
    balloon: &'a BalloonPages<PendingMigrations>,
    guard: &'a MigrationGuard<'a>,
    /// The nodes to take pages from.
    nodes: NodeSet,
    /// These pages, one for each pending migration at most. They must return to the balloon.
    unknown: PageList,
}

impl Dequeue<'_> {
    /// Like [`BalloonPages::take`].
    fn take(&mut self, max: usize, max_blocks: usize) -> PageList {
        loop {
            let mut pages = self.balloon.take(max, max_blocks, &self.nodes);
            let taken = pages.len();

            self.guard
                .split_off_unacknowledged(&mut pages, &mut self.unknown);
            if taken == 0 || !pages.is_empty() {
                return pages;
            }
        }
    }
}

/// Takes up to `wanted` pages (kernel pages) of `nodes` out of `balloon`, and frees them as soon as
/// the protocol allows. Returns how many were taken out: fewer if the rest waits for the device.
///
/// [`send_backlog`] reports them. The device must have seen the inflate of these pages: others stay
/// in the balloon, and `guard` prevents new ones. `batch` sorts the pages.
pub(crate) fn release(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
    batch: &mut Batch,
    nodes: NodeSet,
    wanted: usize,
    reason: Reason,
    guard: &MigrationGuard<'_>,
) -> usize {
    let terms = deflate.lock().terms;
    let notify_first = match reason {
        Reason::Target | Reason::Isolated => terms.notify_first(),
        Reason::OutOfMemory => terms.notify_first_out_of_memory(),
    };
    let mut dequeue = Dequeue {
        balloon,
        guard,
        nodes,
        unknown: PageList::new(),
    };
    let mut released = 0;

    while released < wanted {
        let some = wanted - released;

        match if notify_first {
            gather(deflate, &mut dequeue, batch, some);
            report(deflate, balloon, batch)
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

/// Traces that `pages` kernel pages left the balloon, if there are any.
fn trace(deflate: &SpinLock<Deflate>, pages: usize, reason: Reason) {
    if pages > 0 {
        let device = deflate.lock().queue.device();
        trace::deflate(device, pages, reason);
    }
}

/// Returns whether pages that are released because memory ran out may be used only when the device
/// has used their message.
pub(crate) fn is_awaited_out_of_memory(deflate: &SpinLock<Deflate>) -> bool {
    deflate.lock().terms.notify_first_out_of_memory()
}

/// Reports as many pages as possible now. Returns whether the device knows all pages that have left
/// the balloon.
pub(crate) fn is_acknowledged(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
) -> bool {
    send_backlog(deflate);
    collect(deflate, balloon);
    !deflate.lock().is_pending()
}

/// Frees up to `wanted` pages before the device is notified.
fn free_first(deflate: &SpinLock<Deflate>, dequeue: &mut Dequeue<'_>, wanted: usize) -> usize {
    let mut pages = dequeue.take(wanted.min(1 << MAX_ORDER), usize::MAX);
    let taken = pages.len();

    // Pages that store the backlog must be freed one by one.
    pages.split_blocks();
    // Ascending pages are recorded from the end.
    while !pages.is_empty() {
        let mut some = pages.take_last(PAGES_PER_HOLD);

        deflate.lock().backlog.record(&mut some);
    }
    taken
}

/// Fills `batch` with up to `wanted` pages, if the queue has room for their message.
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

/// Reports the pages in `batch`, which are freed when the device has used the messages. Returns how
/// many pages were sent; the others stay in the balloon.
fn report(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<PendingMigrations>,
    batch: &mut Batch,
) -> usize {
    let mut reported = 0;

    while batch.pages() > 0 {
        let draft = deflate.lock().queue.draft();
        // A message may list thousands of blocks or pages, so it is written without the lock.
        let written = draft.map(|draft| draft.write(batch));
        let sent = {
            let mut this = deflate.lock();
            let sent = this.queue.send_written(written);

            this.leaving += sent.as_ref().map_or(0, |pages| *pages);
            sent
        };

        match sent {
            Ok(pages) => reported += pages,
            Err((pages, _)) => {
                balloon.insert(pages);
                balloon.insert(batch.take_all());
            }
        }
    }

    reported
}
