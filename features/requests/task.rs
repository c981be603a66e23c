// SPDX-License-Identifier: GPL-2.0

//! Host requests: unused pages, dropping caches.
//!
//! The device writes each request into a buffer of the driver. Answers use the same queue, and each
//! message has the request's id. A completion ends an answer. Several requests may be open. The
//! driver serves them round-robin, one message at a time, and checks for new requests in between.
//! So no request waits for a long answer, and a cancel takes effect at once.
//!
//! The costs of requests for the guest are bounded: the memory for answers (`MAX_OPEN` and
//! `MAX_MESSAGES` in `queue.rs`), the pages that are isolated at a time (`RANGE_PAGES` in
//! `work.rs`), and the CPU time ([`Budget`](crate::features::budget::Budget)).
//!
//! [`free_pages`](crate::free_pages) and docs/protocol.md, section 5, define the meaning of an
//! answer.

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
            Allocation,
            AnswerProgress,
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

/// How many steps one run of the task makes.
const STEPS_PER_RUN: usize = 64;

/// The requests of a device.
#[pin_data]
pub(super) struct HostRequests {
    #[pin]
    pub(super) inner: Mutex<Inner>,
    /// The run time of threads that was not charged to the budget yet, in nanoseconds.
    pub(super) spent: Arc<Atomic<i64>>,
    pub(super) waker: Waker,
    pub(super) settings: Arc<Settings>,
    /// Takes memory blocks, if the kernel zeroes the memory that it allocates.
    pub(super) offliner: Option<Arc<Task<Offliner>>>,
    #[pin]
    pub(super) counters: Counters,
    /// The start of the clock.
    pub(super) start: Instant<Monotonic>,
}

/// The result of a step of a request.
enum Step {
    /// It continues.
    Again,
    /// It waits for the device, for caches to be dropped, or for another allocation.
    Wait,
    /// It is completed.
    Over,
}

impl HostRequests {
    /// Returns how long other tasks have worked for requests since the previous call, in
    /// nanoseconds.
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

            let time = start.elapsed().max(timeouts::DROPPING_CACHES);
            spent.add(time.as_nanos(), Relaxed);
            outcome
        }))
    }

    /// Makes a step of `open`.
    fn step(&self, inner: &mut Inner, open: &mut Open) -> Step {
        let counters = &self.counters;
        let progress = match &mut open.work {
            Work::Skip(walk) => inner.skip(open.id, walk, counters),
            Work::Discard(discard) if discard.blocks.is_some() => {
                inner.discard_block(open.id, discard, counters)
            }
            Work::Discard(discard) if discard.allocation.is_some() => {
                inner.send_allocated(open.id, discard, counters)
            }
            Work::Discard(discard) => inner.discard(
                discard,
                self.settings.floor_pages(),
                counters,
                |range, taking, right| {
                    let (spent, waker) = (self.spent.clone(), self.waker.clone());

                    Allocation::start(range, taking, right, spent, waker)
                },
            ),
            Work::DropCaches(caches) => match self.drop_caches(*caches) {
                Some(Ok(thread)) => {
                    open.work = Work::CacheDropper(thread);
                    None
                }
                Some(Err(_)) => Some(AnswerProgress::End(request::ABORTED)),
                None => None,
            },
            Work::CacheDropper(thread) => thread.outcome().map(|outcome| match outcome {
                Ok(()) => AnswerProgress::End(request::COMPLETE),
                Err(_) => AnswerProgress::End(request::ABORTED),
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
                        Step::Over
                    }
                    None => Step::Wait,
                };
            }
        };

        match progress {
            None => Step::Wait,
            Some(AnswerProgress::More) => Step::Again,
            Some(AnswerProgress::End(status)) => {
                open.work = Work::Complete(status);
                Step::Again
            }
        }
    }

    /// Does the work that is possible now. Returns after how many milliseconds to run again without
    /// an event.
    fn advance(&self, inner: &mut Inner) -> Option<Msecs> {
        let now = || self.start.elapsed().as_nanos();
        let start = now();
        inner.queue.disable_callback();
        // Take used messages in any case, so that the guest gets its memory back.
        inner.collect(self.offliner.as_ref());
        inner.budget.spend(self.spent(), start);
        // Completions are sent in any case.
        let pause = inner.budget.pause(start);

        let steps = self.make_steps(inner, pause.is_some());
        if let Some(offliner) = &self.offliner {
            // The requests may have been cancelled. No other one takes the blocks that are ready.
            if !inner.open.iter().any(Open::needs_blocks) {
                offliner.cancel();
            }
        }
        inner.queue.kick();
        self.counters.open.store(inner.open.len() as u64, Relaxed);

        let end = now();
        inner.budget.spend(end - start, end);
        if steps == STEPS_PER_RUN || !inner.queue.enable_callback() {
            Some(0)
        } else if let Some(pause) = pause {
            Some(pause.min(timeouts::MISSED_INTERRUPT))
        } else if inner.messages > 0 || !inner.open.is_empty() || inner.request_buffers == 0 {
            // Without a buffer, because there was no memory, the device cannot send a request.
            Some(timeouts::MISSED_INTERRUPT)
        } else {
            None
        }
    }

    /// Makes steps of the open requests round-robin, until all of them wait. With `is_paused` it
    /// starts no new work. Returns the number of steps.
    fn make_steps(&self, inner: &mut Inner, is_paused: bool) -> usize {
        let (mut steps, mut waiting) = (0, 0);

        loop {
            if !is_paused {
                inner.refill_request_buffers();
            }
            if steps == STEPS_PER_RUN || waiting == inner.open.len() {
                return steps;
            }
            let Ok(mut open) = inner.open.remove(0) else {
                return steps;
            };

            let step = match is_paused && open.is_new_work() {
                true => Step::Wait,
                false => self.step(inner, &mut open),
            };

            // Move it to the end, so that the next step is that of another request. There is room,
            // since it was taken from the list.
            if !matches!(step, Step::Over) {
                let _ = inner.open.push_within_capacity(open);
            }
            // Used messages make room for requests that wait.
            let is_more = inner.collect(self.offliner.as_ref());
            match step {
                Step::Wait if !is_more => waiting += 1,
                Step::Wait | Step::Again | Step::Over => waiting = 0,
            }
            steps += 1;
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

/// Returns why a request was refused, if `status` is a refusal.
fn refusal(status: u8) -> Option<&'static str> {
    match status {
        request::UNSUPPORTED => Some("its command is not known"),
        request::MALFORMED => Some("a field has no legal value"),
        request::UNKNOWN_ID => Some("there is nothing to cancel under that id"),
        _ => None,
    }
}
