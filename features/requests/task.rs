// SPDX-License-Identifier: GPL-2.0

//! Requests of the host: unused pages, dropping caches.
//!
//! The device has buffers of the driver's that it fills in, one for each request; the answers go
//! through the same queue, each message with the request's id. A completion ends an answer.
//! Several requests may be open. They take turns, message by message, and between two messages the
//! driver looks for new requests, so that nothing waits for a long answer, and calling one off
//! takes effect at once.
//!
//! What the host can cost the guest is bounded: the memory for answers (`MAX_OPEN` and
//! `MAX_MESSAGES` in `queue.rs`), the pages that are isolated at a time (`CLAIM_PAGES` in
//! `work.rs`), and the time ([`Budget`](crate::features::budget::Budget)).
//!
//! What an answer means is said in [`free_pages`](crate::free_pages), and in docs/protocol.md,
//! section 5.

#![forbid(unsafe_code)]

use crate::{
    device::{
        settings::Settings,
        timeouts, //
    },
    features::requests::{
        counters::Counters,
        queue::Inner,
        work::{
            Caches,
            Open,
            Work, //
        }, //
    },
    rust::{
        fs::caches::CacheDropper,
        virtio_balloon::request,
        work::{
            task::{
                Job,
                Task,
                Waker, //
            },
            thread::Thread, //
        }, //
    },
    sources::memory_blocks::Offliner, //
};

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic,
        Msecs, //
    }, //
};

/// How many turns there are in one run of the task.
const TURNS_PER_RUN: usize = 64;

/// What dropping caches costs of the budget at least, in nanoseconds: the kernel logs a line for it
/// each time.
const DROPPING: i64 = 500_000_000;

/// The requests of a device.
#[pin_data]
pub(super) struct HostRequests {
    #[pin]
    pub(super) inner: Mutex<Inner>,
    /// How long dropping caches took that the budget has not been charged for, in nanoseconds.
    pub(super) spent: Arc<Atomic<i64>>,
    pub(super) waker: Waker,
    pub(super) settings: Arc<Settings>,
    /// What takes memory blocks, where that is better than to allocate memory.
    pub(super) offliner: Option<Arc<Task<Offliner>>>,
    #[pin]
    pub(super) counters: Counters,
    /// What times are counted from.
    pub(super) start: Instant<Monotonic>,
}

/// What a request has come to in its turn.
enum Turn {
    /// It continues.
    Again,
    /// It waits for the device, or for caches to be dropped.
    Wait,
    /// It is completed.
    Over,
}

impl HostRequests {
    /// Returns how long other tasks have worked for requests since the last call, in nanoseconds.
    fn spent(&self) -> i64 {
        let taking = self
            .offliner
            .as_ref()
            .map_or(0, |offliner| offliner.spent());

        self.spent.xchg(0, Relaxed) + taking
    }

    /// Begins to drop `caches`. Returns none while another request does so.
    fn drop_caches(&self, caches: Caches) -> Option<Result<Thread>> {
        let dropping = CacheDropper::begin()?;
        let spent = self.spent.clone();
        let waker = self.waker.clone();

        Some(Thread::start(c"balloon_rs_drop", Some(waker), move || {
            let start = Instant::<Monotonic>::now();
            let outcome = dropping.drop_caches(caches.pages, caches.slab);

            spent.add(start.elapsed().as_nanos().max(DROPPING), Relaxed);
            outcome
        }))
    }

    /// Gives `open` its turn.
    fn turn(&self, inner: &mut Inner, open: &mut Open) -> Turn {
        let counters = &self.counters;
        let step = match &mut open.work {
            Work::Skip(walk) => inner.skip(open.id, walk, counters),
            Work::Discard(discard) => match &mut discard.blocks {
                Some(blocks) => {
                    let step = inner.discard_block(open.id, blocks, &mut discard.named, counters);

                    if step == Some(None) {
                        discard.blocks = None;
                    }
                    step.map(|_| None)
                }
                None => inner.discard(open.id, discard, self.settings.floor_pages(), counters),
            },
            Work::DropCaches(caches) => match self.drop_caches(*caches) {
                Some(Ok(thread)) => {
                    open.work = Work::CacheDropper(thread);
                    None
                }
                Some(Err(_)) => Some(Some(request::ABORTED)),
                None => None,
            },
            Work::CacheDropper(thread) => thread.outcome().map(|outcome| match outcome {
                Ok(()) => Some(request::COMPLETE),
                Err(_) => Some(request::ABORTED),
            }),
            Work::Complete(status) => {
                let status = *status;

                return match inner.complete(open.id, status) {
                    Some(()) => {
                        counters.completed.add(1, Relaxed);
                        if let Some(reason) = refusal(status) {
                            counters.refused.add(1, Relaxed);
                            inner.log_refusal(open.id, reason);
                        }
                        Turn::Over
                    }
                    None => Turn::Wait,
                };
            }
        };

        match step {
            None => Turn::Wait,
            Some(None) => Turn::Again,
            Some(Some(status)) => {
                open.work = Work::Complete(status);
                Turn::Again
            }
        }
    }

    /// Does what can be done now. Returns in how many milliseconds to run again, if nothing happens
    /// before.
    fn advance(&self, inner: &mut Inner) -> Option<Msecs> {
        let now = || self.start.elapsed().as_nanos();
        let start = now();
        inner.queue.disable_callback();
        // What the device has used comes back to the guest in any case.
        inner.collect(self.offliner.as_ref());
        inner.budget.spend(self.spent(), start);
        // Completed requests are reported even so.
        let pause = inner.budget.pause(start);

        let turns = self.take_turns(inner, pause.is_some());
        if let Some(offliner) = &self.offliner {
            // The requests may have been cancelled.
            if offliner.is_busy() && !inner.open.iter().any(Open::needs_blocks) {
                offliner.cancel();
            }
        }
        inner.queue.kick();
        self.counters.open.store(inner.open.len() as u64, Relaxed);

        let end = now();
        inner.budget.spend(end - start, end);
        if turns == TURNS_PER_RUN || !inner.queue.enable_callback() {
            Some(0)
        } else if let Some(pause) = pause {
            Some(pause.min(timeouts::MISSED_INTERRUPT))
        } else if inner.messages > 0 || !inner.open.is_empty() || inner.request_buffers == 0 {
            // Without a buffer for a request, because there was no memory, the device cannot ask.
            Some(timeouts::MISSED_INTERRUPT)
        } else {
            None
        }
    }

    /// Gives the open requests their turns, until all of them wait. With `is_paused` nothing is begun.
    /// Returns how many turns there were.
    fn take_turns(&self, inner: &mut Inner, is_paused: bool) -> usize {
        let (mut turns, mut waiting) = (0, 0);

        loop {
            if !is_paused {
                inner.refill_request_buffers();
            }
            if turns == TURNS_PER_RUN || waiting == inner.open.len() {
                return turns;
            }
            let Ok(mut open) = inner.open.remove(0) else {
                return turns;
            };

            let turn = match open.work {
                Work::Skip(_) | Work::Discard(_) | Work::DropCaches(_) if is_paused => Turn::Wait,
                _ => self.turn(inner, &mut open),
            };

            // To the end, where there is room, since it comes from there: the next turn is another
            // one's.
            if !matches!(turn, Turn::Over) {
                let _ = inner.open.push_within_capacity(open);
            }
            match turn {
                Turn::Wait => waiting += 1,
                Turn::Again | Turn::Over => waiting = 0,
            }
            turns += 1;
            inner.collect(self.offliner.as_ref());
        }
    }
}

impl Job for HostRequests {
    fn run(task: &Task<Self>) {
        let mut inner = task.inner.lock();

        // If the queue is broken, so is the device: no further request arrives.
        match task.advance(&mut inner) {
            Some(delay) if !inner.queue.is_broken() => task.schedule_in(delay),
            _ => (),
        }
    }
}

/// Returns why a request was refused, if that is what `status` says.
fn refusal(status: u8) -> Option<&'static str> {
    match status {
        request::UNSUPPORTED => Some("its command is not known"),
        request::MALFORMED => Some("a field has no legal value"),
        request::UNKNOWN_ID => Some("there is nothing to cancel under that id"),
        _ => None,
    }
}
