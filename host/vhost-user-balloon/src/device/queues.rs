// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Serving the queues.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use balloon_control::Changes;
use balloon_wire::status::Status;
use log::{debug, error, warn};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::Device;
use super::work::Work;
use crate::budget::{BUDGET, Budget};
use crate::counters::{Counter, Counters};
use crate::memory::hazard::Identity;
use crate::queues::answers::Answers;
use crate::queues::deflate::Deflate;
use crate::queues::hinting::Hinting;
use crate::queues::inflate::Inflate;
use crate::queues::pages::Format;
use crate::queues::reporting::Reporting;
use crate::queues::virtqueue::{Next, Receiver, Unfinished, serve};
use crate::sync::{Level, lock, order};
use crate::virtio::config::bytes;
use crate::virtio::features::{Feature, tells_before_use};
use crate::virtio::kind::{ByKind, Kind};

/// The time between two attempts to allocate memory that the host lacks.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// How long the thread releases all locks after the time of a queue's turn. Otherwise it would usually take the
/// locks again before a waiting thread is awake.
const PAUSE: Duration = Duration::from_millis(1);

/// A queue during its turn.
struct Turn<'a> {
    vring: &'a mut VringState,
    /// The guest's memory, which contains the messages.
    memory: &'a GuestMemoryMmap,
    /// The features that the driver has accepted.
    acked: u64,
    counters: &'a Counters,
    /// The counter of the queue's messages.
    messages: &'a Counter,
}

impl Turn<'_> {
    /// Takes a batch of messages.
    fn serve(
        &mut self,
        heads: &mut Vec<u16>,
        unfinished: &mut Unfinished,
        receiver: &mut impl Receiver,
    ) -> Next {
        serve(
            self.vring,
            self.memory,
            heads,
            unfinished,
            self.counters,
            self.messages,
            receiver,
        )
    }
}

impl Device {
    /// Makes the worker thread serve a queue.
    pub(super) fn wake(&self, number: usize) {
        self.pending.fetch_or(1 << number, SeqCst);
        if let Err(error) = self.wake.write(1) {
            error!("cannot wake the worker: {error}");
        }
    }

    /// Serves a queue for a bounded number of messages and a bounded time.
    pub(super) fn serve_queue(&self, number: usize, vrings: &[VringMutex]) {
        let acked = self.acked.load(SeqCst);
        let (Some(kind), Some(vring)) = (Kind::of(number, acked), vrings.get(number)) else {
            return;
        };
        if kind == Kind::Deflate && self.blocked.load(SeqCst) {
            return;
        }
        // The front end must not wait for the locks below while the state of processes is read.
        let looked = self.look(kind);
        let order = order(Level::Queue);
        let mut vring = vring.get_mut();
        if !vring.is_enabled() {
            return;
        }
        let mut work = lock(&self.work);
        if kind == Kind::Inflate && !self.is_at_work(&mut work, vring.get_queue()) {
            return;
        }
        work.discarder.withhold = match looked {
            Some((files, _)) if files != work.balloon.files() => return self.wake(number),
            Some((_, is_hazardous)) => is_hazardous || self.inhibited().is_some(),
            None => false,
        };
        // The memory for looking up page frame numbers. The library may have replaced its own map
        // meanwhile.
        let memory = Arc::clone(&work.memory);
        let mut turn = Turn {
            vring: &mut vring,
            memory: &memory,
            acked,
            counters: &self.counters,
            messages: self.counters.messages.of(kind),
        };
        let next = self.serve_kind(kind, &mut turn, &mut work);
        let held = work.balloon.held();
        let has_changed =
            self.held.swap(held, SeqCst) != held || matches!(kind, Kind::Requests | Kind::Hinting);
        if !work.unfinished.of(kind).is_some() {
            *work.taken_up.of_mut(kind) = false;
        }
        let pause = next == Next::Soon && work.paused.is_none_or(|at| at.elapsed() >= BUDGET);
        if pause {
            work.paused = Some(Instant::now());
        }
        drop(work);
        drop(vring);
        drop(order);
        if has_changed {
            self.publish(Changes::info);
        }
        if pause {
            thread::sleep(PAUSE);
        }
        match next {
            Next::Notified => {}
            Next::Soon => self.wake(number),
            Next::Later => self.retry(),
        }
    }

    /// Whether a driver is at work. The driver of this inflate queue starts, if there is none.
    fn is_at_work(&self, work: &mut Work, queue: &Queue) -> bool {
        if !work.at_work && queue.ready() {
            self.start(work, queue.next_avail());
        }
        work.at_work
    }

    /// For a queue whose messages return memory, the result of [`Device::look_at_processes`].
    fn look(&self, kind: Kind) -> Option<(BTreeSet<Identity>, bool)> {
        match kind {
            Kind::Inflate | Kind::Reporting | Kind::Requests => Some(self.look_at_processes()),
            Kind::Deflate | Kind::Stats | Kind::Hinting => None,
        }
    }

    /// The files that hold the guest's memory, and whether a process's use of it forbids returning any of it.
    pub(super) fn look_at_processes(&self) -> (BTreeSet<Identity>, bool) {
        let files = self.sizes().files;
        let is_hazardous = !self.process_hazards(&files).is_empty();
        (files, is_hazardous)
    }

    fn serve_kind(&self, kind: Kind, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        match kind {
            Kind::Inflate => self.serve_inflate(turn, work),
            Kind::Deflate => self.serve_deflate(turn, work),
            Kind::Stats => self.serve_stats(turn),
            Kind::Hinting => self.serve_hinting(turn, work),
            Kind::Reporting => self.serve_reporting(turn, work),
            Kind::Requests => self.serve_requests(turn, work),
        }
    }

    fn serve_inflate(&self, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        let mut inflate = Inflate {
            memory: turn.memory,
            balloon: &mut work.balloon,
            told_before_use: tells_before_use(turn.acked),
            begun: *work.taken_up.of(Kind::Inflate),
            discarder: &mut work.discarder,
            format: Format::of(turn.acked),
            counters: turn.counters,
            pages: &mut work.pages,
            pieces: &mut work.pieces,
            report: &|status| self.change_fields(|fields| fields.set_status(status)),
        };
        let unfinished = work.unfinished.of_mut(Kind::Inflate);
        let next = turn.serve(&mut work.heads, unfinished, &mut inflate);
        work.position = Some(turn.vring.get_queue().next_avail());
        next
    }

    fn serve_deflate(&self, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        let mut deflate = Deflate {
            memory: turn.memory,
            balloon: &mut work.balloon,
            discarder: &mut work.discarder,
            prefault: self.settings.prefault,
            told_before_use: tells_before_use(turn.acked),
            begun: *work.taken_up.of(Kind::Deflate),
            format: Format::of(turn.acked),
            counters: turn.counters,
            pages: &mut work.pages,
            pieces: &mut work.pieces,
        };
        let unfinished = work.unfinished.of_mut(Kind::Deflate);
        turn.serve(&mut work.heads, unfinished, &mut deflate)
    }

    fn serve_stats(&self, turn: &mut Turn<'_>) -> Next {
        let actual = lock(&self.state).config.actual;
        let size = self.is_at_rest().then(|| bytes(actual));
        let mut stats = lock(&self.stats);
        let before = (stats.sequence(), stats.notices());
        let notices = Feature::Pressure.is_in(turn.acked);
        stats.serve(
            turn.vring,
            turn.memory,
            turn.counters,
            turn.messages,
            size,
            notices,
        );
        let (is_new, is_short) = (stats.sequence() != before.0, stats.notices() != before.1);
        drop(stats);
        self.sampled.notify_all();
        if is_new {
            self.publish(Changes::stats);
        }
        if is_short {
            self.release();
        }
        self.follow();
        Next::Notified
    }

    fn serve_hinting(&self, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        let mut hinting = Hinting {
            memory: turn.memory,
            hints: &self.hints,
            counters: turn.counters,
            budget: Budget::turn(),
        };
        let unfinished = work.unfinished.of_mut(Kind::Hinting);
        turn.serve(&mut work.heads, unfinished, &mut hinting)
    }

    fn serve_reporting(&self, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        let mut reporting = Reporting {
            balloon: &work.balloon,
            discarder: &mut work.discarder,
            counters: turn.counters,
            keep: self.keeps_free_pages(),
            ranges: &mut work.ranges,
            pieces: &mut work.pieces,
        };
        let unfinished = work.unfinished.of_mut(Kind::Reporting);
        turn.serve(&mut work.heads, unfinished, &mut reporting)
    }

    fn serve_requests(&self, turn: &mut Turn<'_>, work: &mut Work) -> Next {
        let mut answers = Answers {
            memory: turn.memory,
            requests: &self.requests,
            balloon: &work.balloon,
            discarder: &mut work.discarder,
            counters: turn.counters,
            keep: self.keeps_free_pages(),
            pieces: &mut work.pieces,
            budget: Budget::turn(),
            done: &mut work.unfinished.of_mut(Kind::Requests).done,
        };
        answers.serve(turn.vring, turn.messages)
    }

    /// Serves the deflate queue again after a while.
    fn retry(&self) {
        self.blocked.store(true, SeqCst);
        if !self.retry.once(RETRY_INTERVAL) {
            self.blocked.store(false, SeqCst);
        }
    }

    /// Handles the start of a driver, whose inflate queue continues at `next`.
    pub(super) fn start(&self, work: &mut Work, next: u16) {
        // A guest can reset its device any number of times.
        let is_logged = self
            .starts
            .fetch_add(1, SeqCst)
            .wrapping_add(1)
            .is_power_of_two();
        if work.is_new_driver(next) {
            // A new driver has reported nothing. The supervisor has repeated the writes of one that continues. The status
            // is stored first: with an empty balloon it would be that of the new driver.
            if !self.channel.continues() {
                lock(&self.state).config.set_status(Status::default());
                work.balloon.write_status_down(Status::default());
            }
            work.balloon.empty();
            work.sweep = None;
            work.taken_up = ByKind::default();
            lock(&self.hints).restart();
            self.leave_alone(is_logged);
            debug!("the guest has a driver, with an empty balloon");
        } else {
            if tells_before_use(self.acked.load(SeqCst)) {
                work.balloon.refill();
                self.sweep_soon(work);
            }
            debug!("the guest's driver continues");
        }
        self.held.store(work.balloon.held(), SeqCst);
        self.channel.started();
        if is_logged {
            self.warn_of_limit();
        }
        work.at_work = true;
        lock(&self.times).started = Some(Instant::now());
        self.running.store(true, SeqCst);
        if self.grace().is_none() {
            self.limit_report_time();
        }
        self.told.store(self.asked(), SeqCst);
        self.set_unknown(false);
        self.publish(Changes::info);
        self.send_change();
    }

    fn warn_of_limit(&self) {
        let target = bytes(lock(&self.state).config.target);
        if let Some(limit) = self.limit().filter(|&limit| target > limit) {
            warn!(
                "the target of {target} bytes would leave a VM of {} bytes too little; the device requests {limit} bytes",
                self.guest_memory().unwrap_or_default()
            );
        }
    }
}
