// SPDX-License-Identifier: GPL-2.0

//! Deflating: pages go from the balloon back to the page allocator.
//!
//! Where the device does not insist on being told first (`VIRTIO_BALLOON_F_MUST_TELL_HOST`), pages are
//! free at once, and the device learns of it whenever it gets round to it. What it has to learn is noted in
//! pages that were in the balloon themselves, so that this path neither allocates nor waits.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation.

#![forbid(unsafe_code)]

use crate::{
    message::{
        MessageQueue,
        Pages,
        PAGES_PER_MESSAGE, //
    },
    migration::{
        Moves,
        Settled, //
    },
    rust::{
        balloon_pages::BalloonPages,
        page_list::PageList,
        range_stack::RangeStack, //
    }, //
};

use kernel::sync::SpinLock;

/// How many pages are taken out of the balloon under one hold of a lock.
const PAGES_PER_HOLD: usize = 512;

/// The deflate queue.
pub(crate) struct Deflate {
    pub(crate) queue: MessageQueue,
    /// Whether pages may be used only after the device has answered.
    must_tell: bool,
    /// What the device has to be told when the queue has room again. Always empty with `must_tell`.
    backlog: RangeStack,
}

impl Deflate {
    /// Begins with an empty queue.
    pub(crate) fn new(queue: MessageQueue, must_tell: bool) -> Self {
        Self {
            queue,
            must_tell,
            backlog: RangeStack::new(),
        }
    }

    /// Returns whether the device has not heard, or not answered, of everything yet.
    pub(crate) fn is_pending(&self) -> bool {
        !self.backlog.is_empty() || self.queue.in_flight() > 0
    }

    /// Forgets what the device has not been told yet. For when it is about to be reset.
    pub(crate) fn forget(&mut self) {
        self.backlog = RangeStack::new();
    }

    /// Tells the device as much of what it has to know as the queue has room for.
    pub(crate) fn tell(&mut self) {
        while self.queue.room() > 0 && !self.backlog.is_empty() {
            if !self.tell_next() {
                break;
            }
        }

        self.queue.notify();
    }

    /// Sends one message about pages in the backlog. Returns whether it succeeded.
    fn tell_next(&mut self) -> bool {
        let Some(mut message) = self.queue.message() else {
            return false;
        };

        while let Some(range) = self.backlog.take(message.room() as u64) {
            // All fit, and whatever was in the balloon has a name.
            let _ = message.name(range.first..range.first + range.len);
        }

        // If the queue does not take it although there is room, there is nobody left to tell.
        self.queue
            .send(message, Pages::List(PageList::new()))
            .is_ok()
    }
}

/// Takes note of what the device has answered. Returns the number of answers.
pub(crate) fn collect(deflate: &SpinLock<Deflate>, balloon: &BalloonPages<Moves>) -> usize {
    let mut answers = 0;

    loop {
        let Some(pages) = deflate.lock().queue.next_used() else {
            return answers;
        };

        // Where the device had to be told first, this is where the pages are freed: not under the lock.
        match pages {
            Pages::List(pages) => drop(pages),
            Pages::Moves(moves) => balloon.replacer().told_old(moves),
        }
        answers += 1;
    }
}

/// Takes up to `wanted` pages (kernel pages) out of `balloon`, and frees them as soon as the device allows
/// it. Returns how many were taken out: fewer if nothing more can be done before the device has answered.
///
/// The device learns of it by [`Deflate::tell`]. It has to know of the pages' arrival before, which is what
/// `_settled` shows.
pub(crate) fn release(
    deflate: &SpinLock<Deflate>,
    balloon: &BalloonPages<Moves>,
    wanted: usize,
    _settled: Settled<'_>,
) -> usize {
    let release_some = if deflate.lock().must_tell {
        tell_first
    } else {
        free_first
    };
    let mut released = 0;

    while released < wanted {
        match release_some(deflate, balloon, wanted - released) {
            0 => break,
            n => released += n,
        }
    }

    released
}

/// Returns whether pages that were released can be used: only where the device must be told first does that
/// depend on its answer.
pub(crate) fn is_over(deflate: &SpinLock<Deflate>, balloon: &BalloonPages<Moves>) -> bool {
    {
        let mut this = deflate.lock();

        if !this.must_tell {
            return true;
        }
        this.queue.notify();
    }

    collect(deflate, balloon);
    !deflate.lock().is_pending()
}

/// Frees some pages, up to `wanted`, before the device has been told.
fn free_first(deflate: &SpinLock<Deflate>, balloon: &BalloonPages<Moves>, wanted: usize) -> usize {
    let mut pages = balloon.take(wanted.min(PAGES_PER_HOLD));
    let taken = pages.len();

    deflate.lock().backlog.record(&mut pages);
    taken
}

/// Tells the device of some pages, up to `wanted`, which are freed when it has answered.
fn tell_first(deflate: &SpinLock<Deflate>, balloon: &BalloonPages<Moves>, wanted: usize) -> usize {
    let mut this = deflate.lock();

    if this.queue.room() == 0 {
        return 0;
    }
    let Some(mut message) = this.queue.message() else {
        return 0;
    };

    let pages = balloon.take(wanted.min(PAGES_PER_MESSAGE));
    let taken = pages.len();
    if taken == 0 {
        return 0;
    }

    // All fit, and whatever was in the balloon has a name.
    let _ = message.name(pages.pfns());

    match this.queue.send(message, Pages::List(pages)) {
        Err(Pages::List(pages)) => {
            drop(this);
            balloon.insert(pages);
            0
        }
        _ => taken,
    }
}
