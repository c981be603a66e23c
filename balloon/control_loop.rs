// SPDX-License-Identifier: GPL-2.0

//! The balloon: compares its size with the target, and does what is missing.
//!
//! It never waits for the device. Each run of the task takes what the device has answered, offers
//! it as much as the queues have room for, and ends; the device's next answer, a new target or the
//! end of a pause starts the next run. So there is nothing to hang on if the device stays silent.
//!
//! Lock order: [`Balloon::worker`] or [`Balloon::oom_batch`], then [`Balloon::deflate`], then
//! [`Moves`]'s lock and the balloon core's `balloon_pages_lock`, one at a time. Memory is allocated
//! under the first one only, which nobody takes who frees memory for others but the notifier of
//! memory that goes offline.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        backoff::{
            Backoff,
            Cause, //
        },
        deflate::{
            self,
            Deflate, //
        },
        inflate::{
            Inflate,
            PageAllocator,
            Stop, //
        },
        migration::Moves,
        stop_reason::{
            StopReason,
            Teller, //
        },
        target::{
            self,
            Step, //
        }, //
    },
    device::{
        attributes,
        log_limit::LogLimit,
        settings::Settings, //
    },
    messages::{
        message::MessageQueue,
        terms::Terms, //
    },
    rust::{
        fs::{
            debugfs::Show,
            sysfs::Attribute, //
        },
        mm::{
            balloon_pages::BalloonPages,
            batch::Batch,
            memory::{
                self,
                Node, //
            }, //
        },
        notifiers::{
            memory_hotplug::GoingOffline,
            oom::OomNotify, //
        },
        trace::Reason,
        virtio,
        virtio_balloon,
        work::{
            task::{
                new_slot,
                Job,
                Slot,
                Task,
                TaskQueue, //
            },
            wakeup::{
                Signal,
                WakeupSource, //
            }, //
        }, //
    },
    sources::memory_blocks::Taker, //
};

use core::{
    mem,
    ops::Range, //
};
use kernel::{
    device::Core,
    fmt,
    new_mutex,
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic,
        Msecs, //
    }, //
};

/// How many pages one run moves at most, so that a new target is seen soon: 1 GiB.
pub(crate) const PAGES_PER_RUN: usize = 1 << (30 - PAGE_SHIFT);

/// How many pages one run allocates at most where the kernel writes to them: 64 MiB.
const ZEROED_PER_RUN: usize = 1 << (26 - PAGE_SHIFT);

/// How many pages are given back at least when the guest runs out of memory: 64 MiB.
const OOM_SHARE: usize = 1 << (26 - PAGE_SHIFT);

/// How many pages on the per-CPU page lists are worth draining these: 4 MiB.
const WORTH_DRAINING: usize = 1 << (22 - PAGE_SHIFT);

/// How long an allocation that has failed waits for the device, where it must be told before pages
/// can be used.
const OOM_PATIENCE: Delta = Delta::from_millis(100);

/// How long unbinding waits for a device that gives no sign of life. The system may suspend after
/// the same time.
const PATIENCE: Delta = Delta::from_millis(2_000);

/// How long unbinding takes at most, for a device that gives signs of life and no more. What it has
/// not heard of by then it forgets with the reset that comes next.
const FAREWELL: Delta = Delta::from_millis(10_000);

/// A balloon that could not grow tries again before its pause is over, when the guest can spare so
/// many kernel pages more: 16 MiB.
const WORTHWHILE: usize = 1 << (24 - PAGE_SHIFT);

/// How often unbinding looks for a sign of life.
const HEARTBEAT: Delta = Delta::from_millis(5);

/// How long it may take until an answer is noticed that the device has not interrupted for.
const LOOK_AGAIN: Msecs = 1_000;

/// How often the driver reports the size of a balloon that is on its way.
const REPORT_INTERVAL: Delta = Delta::from_millis(1_000);

/// For how long a device counts as alive that has just used a buffer.
const ALIVE: Delta = Delta::from_millis(100);

/// How long compaction holds on to pages that it has isolated, more or less.
const ISOLATION: Msecs = 10;

/// A memory balloon.
#[pin_data]
pub(crate) struct Balloon {
    dev: ARef<virtio::Device>,
    wakeup: Arc<WakeupSource>,

    settings: Arc<Settings>,

    /// Why the balloon is smaller than the target, as a number of the protocol.
    reason: Atomic<u32>,

    pages: BalloonPages<Moves>,

    /// What takes memory blocks, where that is better than to allocate memory.
    taker: Option<Arc<Task<Taker<Balloon>>>>,

    /// What only the task uses.
    #[pin]
    worker: Mutex<Worker>,

    #[pin]
    deflate: SpinLock<Deflate>,

    /// Where pages are put in order when the guest has run out of memory.
    #[pin]
    oom_batch: Mutex<Batch>,

    /// Set when the device has just used buffers: an answer that the task finds without that may be
    /// older than the device's end.
    is_alive: Atomic<bool>,

    /// Set when the device has changed its configuration space, and the target was not read since.
    target_changed: Atomic<bool>,

    /// The same for the settings.
    settings_changed: Atomic<bool>,

    /// The pages that were given back to keep the guest from running out of memory, and that the
    /// task does not know of yet.
    given_for_oom: Atomic<usize>,

    /// Set when all is to be given back, whatever the target.
    giving_back: Atomic<bool>,

    /// Whether the device did not answer in time when the driver took leave of it.
    was_silent: Atomic<bool>,

    /// What times are counted from.
    start: Instant<Monotonic>,
}

/// What only the task uses.
struct Worker {
    config: virtio::Config,
    inflate: Inflate,
    /// Where pages are put in order.
    batch: Batch,
    backoff: Backoff,
    /// Whether memory blocks were taken as far as they can be, for this target.
    blocks_taken: bool,
    /// What keeps the balloon from growing, when it has to.
    stopped: Option<StopReason>,
    /// What the guest could spare when the balloon did not grow, in kernel pages.
    spare: usize,
    teller: Teller,
    /// The target that was read last, in balloon pages.
    wanted: u32,
    /// The size that was reported last, in balloon pages.
    actual: Option<u32>,
    /// How many messages the device has answered, of each queue.
    answered: [usize; 2],
    /// When the device has shown that it is alive, the last time.
    alive: Option<Instant<Monotonic>>,
    /// When the configuration space was read or written last.
    accessed: Instant<Monotonic>,
    /// When the device has answered, or pages have left the balloon, the last time.
    progress: Instant<Monotonic>,
    /// Since when the device has not known of all pages that were moved.
    moving: Option<Instant<Monotonic>>,
    /// What has ended all work, and was logged.
    error: Option<Error>,
    log_limit: LogLimit,
}

/// Sets up what exists for as long as the device is not reset.
fn set_up(
    dev: &virtio::Device<Core<'_>>,
    inflate: MessageQueue,
    deflate: MessageQueue,
) -> Result<(Worker, Deflate)> {
    Ok((
        Worker {
            config: dev.config()?,
            inflate: Inflate::new(inflate),
            batch: Batch::new()?,
            backoff: Backoff::new(),
            blocks_taken: false,
            stopped: None,
            spare: 0,
            teller: Teller::new(dev.has_feature(virtio_balloon::F_STOP_REASON)),
            wanted: 0,
            actual: None,
            answered: [0; 2],
            alive: None,
            accessed: Instant::now(),
            progress: Instant::now(),
            moving: None,
            error: None,
            log_limit: LogLimit::new(),
        },
        Deflate::new(deflate, Terms::of(dev)),
    ))
}

impl Balloon {
    /// Returns an initialiser for an empty balloon in `slot`, whose other tasks run on `tasks`.
    pub(crate) fn new(
        slot: &Slot<Self>,
        dev: &virtio::Device<Core<'_>>,
        inflate: MessageQueue,
        deflate: MessageQueue,
        tasks: &Arc<TaskQueue>,
        settings: Arc<Settings>,
        wakeup: Arc<WakeupSource>,
    ) -> Result<impl PinInit<Self, Error>> {
        let (worker, deflate) = set_up(dev, inflate, deflate)?;
        // Memory that can come back by itself is still the guest's.
        let adjust_managed = !dev.has_feature(virtio_balloon::F_DEFLATE_ON_OOM);
        if !settings.inflate() {
            dev_info!(
                dev,
                "{}: the balloon stays empty\n",
                StopReason::Excluded.words()
            );
        }

        let taker = match settings.memory_blocks() {
            true => {
                let slot_for_blocks = || new_slot!(c"virtio_balloon_rs_blocks", tasks);
                Taker::new(
                    slot_for_blocks,
                    dev,
                    settings.clone(),
                    usize::MAX,
                    slot.waker(),
                )?
            }
            false => None,
        };
        let moves = Moves::new(slot.waker(), Terms::of(dev))?;
        let pages = BalloonPages::new(adjust_managed, moves)?;
        let oom_batch = Batch::new()?;
        let dev = (&**dev).into();

        Ok(try_pin_init!(Self {
            dev,
            wakeup,
            settings,
            reason: Atomic::new(StopReason::value(None)),
            pages,
            taker,
            worker <- new_mutex!(worker, "Balloon::worker"),
            deflate <- new_spinlock!(deflate, "Balloon::deflate"),
            oom_batch <- new_mutex!(oom_batch, "Balloon::oom_batch"),
            is_alive: Atomic::new(false),
            target_changed: Atomic::new(true),
            settings_changed: Atomic::new(false),
            given_for_oom: Atomic::new(0),
            giving_back: Atomic::new(false),
            was_silent: Atomic::new(false),
            start: Instant::now(),
        }))
    }

    /// Takes up the work again with a device that was reset. The task must not be running.
    pub(crate) fn attach(
        &self,
        dev: &virtio::Device<Core<'_>>,
        inflate: MessageQueue,
        deflate: MessageQueue,
    ) -> Result {
        let (worker, deflate) = set_up(dev, inflate, deflate)?;

        self.moves().reset(Terms::of(dev))?;
        *self.worker.lock() = worker;
        // What was there before is dropped when the lock has been released: that may sleep.
        let _before = mem::replace(&mut *self.deflate.lock(), deflate);

        self.giving_back.store(false, Relaxed);
        if let Some(taker) = &self.taker {
            taker.enter();
        }
        Ok(())
    }

    /// Returns whether the device did not answer in time when the driver took leave of it.
    pub(crate) fn was_silent(&self) -> bool {
        self.was_silent.load(Relaxed)
    }

    /// Gives back what a device that did not answer has kept from that. It was reset, so that there
    /// is no balloon any more.
    pub(crate) fn take_back(&self) {
        while !self.pages.take(usize::MAX, usize::MAX, false).is_empty() {}

        self.worker.lock().inflate.take_back();
        self.moves().take_back();
        // Dropped when the lock has been released: that may sleep.
        let _before = self.deflate.lock().take_back();
    }

    fn moves(&self) -> &Moves {
        self.pages.replacer()
    }

    /// Says that the device has just used buffers.
    pub(crate) fn queue_used(&self) {
        self.is_alive.store(true, Relaxed);
    }

    /// Says that the device may have a new target.
    pub(crate) fn target_changed(&self) {
        self.target_changed.store(true, Release);
        self.wakeup.raise(Signal::Target);
    }

    /// The device's target, in kernel pages, as it was seen last.
    pub(crate) fn host_target(&self) -> usize {
        target::pages(self.worker.lock().wanted)
    }

    /// Returns the balloon's size in kernel pages. Pages that the guest cannot use yet count.
    pub(crate) fn size(&self) -> usize {
        let leaving = self.deflate.lock().leaving();

        self.pages.len() + leaving
    }

    /// Returns why the balloon is smaller than the target, as a number of the protocol.
    pub(crate) fn reason(&self) -> u32 {
        self.reason.load(Relaxed)
    }

    /// Announces `reason` in the guest, unless it was announced last.
    fn announce(&self, reason: Option<StopReason>) {
        let value = StopReason::value(reason);

        if self.reason.xchg(value, Relaxed) != value {
            self.dev
                .announce_attribute(attributes::DIRECTORY, attributes::Reason::NAME);
        }
    }

    /// Lets the system suspend again, unless there is a new target.
    fn relax(&self) {
        self.wakeup.lower(Signal::Target);

        // `target_changed` may have come in between.
        if self.target_changed.load(Acquire) {
            self.wakeup.raise(Signal::Target);
        }
    }

    /// Stops the task, gives everything back and tells the device, for as long as the device shows
    /// that it is alive. For when the device is about to be reset.
    ///
    /// Waits at most [`PATIENCE`] for the next sign of life, and [`FAREWELL`] in all. What remains
    /// in the balloon after that is given back when `self` is dropped.
    pub(crate) fn give_back(task: &Task<Self>) {
        // The caller does the task's work from here on. While the system suspends, the task would
        // not run.
        task.stop();
        task.giving_back.store(true, Relaxed);
        if let Some(taker) = &task.taker {
            taker.leave();
        }

        let mut worker = task.worker.lock();
        let start = Instant::<Monotonic>::now();
        worker.progress = start;

        while let Ok(again) = task.advance(&mut worker) {
            if task.pages.len() == 0
                && worker.inflate.in_flight() == 0
                && !task.deflate.lock().is_pending()
            {
                break;
            }

            if worker.progress.elapsed() > PATIENCE || start.elapsed() > FAREWELL {
                dev_warn!(
                    task.dev,
                    "the device does not answer in time: leaving without it, with {} MiB in the balloon\n",
                    mib(task.pages.len())
                );
                task.was_silent.store(true, Relaxed);
                break;
            }

            if again != Some(0) {
                fsleep(HEARTBEAT);
            }
        }

        // A report of free pages was not answered either.
        if worker.inflate.queue.is_reset() {
            task.was_silent.store(true, Relaxed);
        }
        task.deflate.lock().forget();
        task.wakeup.lower(Signal::Target);
    }

    /// Stops all work: the system shuts down.
    pub(crate) fn shut_down(task: &Task<Self>) {
        task.stop();
        if let Some(taker) = &task.taker {
            taker.stop();
        }
    }

    /// Returns whether a queue is broken, so that nothing more comes of the work.
    fn is_broken(&self, worker: &Worker) -> bool {
        worker.inflate.queue.is_broken() || self.deflate.lock().queue.is_broken()
    }

    /// Reads the target if the device has changed its configuration space: no more often, since an
    /// access may be the end of a guest whose device is gone (docs/reliability.md). Returns it, in
    /// balloon pages, if it was read.
    fn read_target(&self, worker: &mut Worker) -> Result<Option<u32>> {
        if self.giving_back.load(Relaxed) || !self.target_changed.xchg(false, Full) {
            return Ok(None);
        }

        worker.accessed = Instant::now();
        match worker.config.read_le32(virtio_balloon::NUM_PAGES) {
            Ok(wanted) => Ok(Some(wanted)),
            Err(EAGAIN) => {
                self.target_changed.store(true, Relaxed);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the target in kernel pages.
    fn target(&self, worker: &Worker) -> usize {
        if self.giving_back.load(Relaxed) || !self.settings.inflate() {
            0
        } else {
            target::pages(worker.wanted)
        }
    }

    /// Returns the kernel pages that the guest can spare.
    fn spare_pages(&self) -> usize {
        let floor = self.settings.floor_pages();
        let nodes: usize = Node::all().map(|node| room(node, floor)).sum();

        memory::available_pages().saturating_sub(floor).min(nodes)
    }

    /// Returns what is missing to have `target` kernel pages in the balloon.
    fn step(&self, worker: &Worker, target: usize) -> Step {
        Step::towards(target, self.pages.len(), worker.inflate.in_flight())
    }

    /// Grows the balloon by up to `wanted` pages. Returns how long to wait before it is worth
    /// another try, unless something happens before.
    fn grow(&self, worker: &mut Worker, target: usize, wanted: usize) -> Option<Msecs> {
        let now = self.start.elapsed().as_millis();
        let ready = self.taker.as_ref().map_or(0, |taker| taker.ready());
        if let Some(pause) = worker.backoff.remaining(now) {
            if worker.stopped == Some(StopReason::AfterOom) {
                return Some(pause);
            }
            // Memory may have come, with which there is something to do.
            if ready == 0 && self.spare_pages() < worker.spare.saturating_add(WORTHWHILE) {
                return Some(pause.min(LOOK_AGAIN));
            }
        }

        // A page that was deflated and that the device has not been told about yet may be among
        // those that are allocated: the device would learn of its return after its new departure.
        let may_send = || self.moves().is_settled() && !self.deflate.lock().is_pending();
        if !may_send() {
            return None;
        }

        let floor = self.settings.floor_pages();
        if worker.stopped == Some(StopReason::Floor) {
            // To drain the per-CPU page lists disturbs all CPUs: only where the balloon grows by it.
            let with_lists = memory::available_pages() + memory::listed_pages();

            if with_lists.saturating_sub(floor) >= wanted.min(WORTH_DRAINING) {
                memory::drain_free_lists();
            }
        }

        if let Some(taker) = &self.taker {
            taker.want(wanted);
            let ready = ready.min(wanted);
            if ready > 0 {
                let source = &***taker;
                let stop =
                    worker
                        .inflate
                        .fill(&self.pages, &mut worker.batch, source, ready, may_send);
                if stop == Stop::Done {
                    worker.stopped = None;
                }
                return (stop == Stop::Done).then_some(0);
            }
            if taker.is_busy() {
                return None;
            }
            if !worker.blocks_taken && Taker::<Self>::is_worthwhile(wanted) {
                worker.blocks_taken = true;
                worker.stopped = None;
                taker.begin(wanted);
                return None;
            }
        }

        let taking = memory::Taking::begin();
        let above_floor = self.spare_pages();
        let now_wanted = wanted.min(match memory::is_zeroed_on_allocation() {
            true => ZEROED_PER_RUN,
            false => PAGES_PER_RUN,
        });
        let mut left = now_wanted.min(above_floor);
        let mut stop = Stop::Done;
        // From each node in proportion to what it has. The queue may be full before each one has given
        // its share: the node that has given least is the first one.
        let mut all: usize = Node::all().map(|node| room(node, floor)).sum();
        let first = Node::all()
            .max_by_key(|&node| target::part(1 << 10, room(node, floor), node.present_pages()));
        let others = Node::all().filter(|&node| Some(node) != first);
        let mut nodes = Iterator::chain(first.into_iter(), others).peekable();
        while let Some(node) = nodes.next() {
            let room = room(node, floor);
            let share = match nodes.peek() {
                Some(_) => target::part(left, room, all),
                None => left,
            };
            all = all.saturating_sub(room);
            left -= share;

            worker.batch.take_from(node);
            match worker.inflate.fill(
                &self.pages,
                &mut worker.batch,
                PageAllocator::new(),
                share,
                may_send,
            ) {
                Stop::Done => (),
                Stop::NoMemory => stop = Stop::NoMemory,
                Stop::NotNow => {
                    stop = Stop::NotNow;
                    break;
                }
            }
        }
        drop(taking);

        let reason = match stop {
            Stop::Done if now_wanted <= above_floor => {
                worker.stopped = None;
                return (now_wanted < wanted).then_some(0);
            }
            Stop::NotNow => return None,
            Stop::Done => StopReason::Floor,
            Stop::NoMemory => StopReason::NoMemory,
        };

        worker.stopped = Some(reason);
        worker.blocks_taken = false;
        worker.spare = self.spare_pages();
        if worker.backoff.fail(Cause::NoMemory, now) && worker.log_limit.allows() {
            dev_info!(
                self.dev,
                "{} of {} MiB in the balloon: {}; trying again from time to time\n",
                mib(self.pages.len() + worker.inflate.in_flight()),
                mib(target),
                reason.words()
            );
        }

        worker
            .backoff
            .remaining(now)
            .map(|pause| pause.min(LOOK_AGAIN))
    }

    /// Shrinks the balloon by up to `wanted` pages. Returns how long to wait before there is more
    /// to do, unless something happens before.
    fn shrink(&self, worker: &mut Worker, wanted: usize) -> Option<Msecs> {
        let limit = wanted.min(PAGES_PER_RUN);
        // Comes again when the device has answered.
        if !self.moves().is_settled() {
            return None;
        }
        let still = self.moves().hold_still();
        let released = deflate::release(
            &self.deflate,
            &self.pages,
            &mut worker.batch,
            limit,
            Reason::Target,
            &still,
        );
        drop(still);

        if released > 0 {
            worker.progress = Instant::now();
        }

        if released == limit {
            (limit < wanted).then_some(0)
        } else if self.deflate.lock().is_pending() {
            None
        } else {
            // Nothing stands in the way but compaction, which has pages of the balloon in its
            // hands.
            Some(ISOLATION)
        }
    }

    /// Returns why the balloon is smaller than the device wants it, where it goes from here with
    /// `step`.
    fn stop_reason(&self, worker: &Worker, step: Step) -> Option<StopReason> {
        match step {
            _ if !self.settings.inflate() => (worker.wanted > 0).then_some(StopReason::Excluded),
            Step::Inflate(_) => worker.stopped,
            Step::Deflate(_) | Step::Rest => None,
        }
    }

    /// Returns whether the balloon's size depends on an answer of the device. Pages that the guest
    /// cannot use yet count as being in the balloon.
    fn is_changing(&self, worker: &Worker) -> bool {
        worker.inflate.in_flight() > 0 || self.deflate.lock().leaving() > 0
    }

    /// Tells the device the balloon's size, and why it goes no further with `step`, as far as that
    /// has changed. For when the device has just shown that it is alive.
    fn report(&self, worker: &mut Worker, step: Step) -> Result {
        let actual = target::balloon_pages(self.size());

        if worker.actual != Some(actual) {
            worker.config.write_le32(virtio_balloon::ACTUAL, actual)?;
            worker.actual = Some(actual);
        }
        worker
            .teller
            .tell(&worker.config, self.stop_reason(worker, step))?;
        worker.accessed = Instant::now();

        Ok(())
    }

    /// Does what can be done now. Returns in how many milliseconds to come again, if nothing
    /// happens before.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `EIO` if a queue is broken.
    fn advance(&self, worker: &mut Worker) -> Result<Option<Msecs>> {
        worker.inflate.queue.wake();
        self.deflate.lock().queue.wake();

        worker.inflate.collect(&self.pages);
        deflate::collect(&self.deflate, &self.pages);
        // The notifiers take answers as well.
        let answered = [
            worker.inflate.queue.answered(),
            self.deflate.lock().queue.answered(),
        ];
        let has_answered = mem::replace(&mut worker.answered, answered) != answered;
        if self.is_alive.xchg(false, Relaxed) && has_answered {
            worker.alive = Some(Instant::now());
        }
        // The size may be final only in a run that comes soon after that.
        let is_alive = worker.alive.is_some_and(|at| at.elapsed() < ALIVE);
        // The device says that something has changed for other reasons, too, such as hints.
        let read = self.read_target(worker)?;
        let target_changed =
            read.is_some_and(|wanted| mem::replace(&mut worker.wanted, wanted) != wanted);

        if target_changed | self.settings_changed.xchg(false, Full) {
            worker.blocks_taken = false;
            worker.backoff.reset();
            worker.stopped = None;
        }
        if target_changed || has_answered {
            worker.progress = Instant::now();
        }

        let given = self.given_for_oom.xchg(0, Relaxed);
        if given > 0 {
            let now = self.start.elapsed().as_millis();

            worker.stopped = Some(StopReason::AfterOom);
            if worker.backoff.fail(Cause::OutOfMemory, now) && worker.log_limit.allows() {
                dev_info!(
                    self.dev,
                    "gave {} MiB back to keep the guest from running out of memory; not growing for a while\n",
                    mib(given)
                );
            }
        }

        let target = self.target(worker);
        let mut again = None;

        let step = self.step(worker, target);
        let is_there = step == Step::Rest && !self.is_changing(worker);
        if is_alive && (is_there || worker.accessed.elapsed() > REPORT_INTERVAL) {
            self.report(worker, step)?;
        }
        if step != Step::Rest {
            self.moves().allow(false);
        }
        if let (Some(taker), Step::Deflate(_) | Step::Rest) = (&self.taker, step) {
            taker.cancel();
        }

        match step {
            Step::Inflate(wanted) => again = self.grow(worker, target, wanted),
            Step::Deflate(wanted) => again = self.shrink(worker, wanted),
            Step::Rest => worker.backoff.reset(),
        }
        if again != Some(0) {
            worker.batch.shrink();
        }

        // Also while the balloon cannot grow: that may take for ever.
        let resting = step == Step::Rest || worker.backoff.is_failing();
        let is_silent = worker.progress.elapsed() > PATIENCE;
        worker.moving = match self.moves().is_settled() {
            true => None,
            false => worker.moving.or(Some(Instant::now())),
        };
        if resting {
            // Whoever wants pages moved would wait for a device that does not answer.
            let is_stuck = is_silent
                && worker
                    .moving
                    .is_some_and(|since| since.elapsed() > PATIENCE);
            self.moves()
                .allow(!is_stuck && !self.giving_back.load(Relaxed));
        }
        if resting || is_silent {
            self.relax();
        }

        self.announce(self.stop_reason(worker, step));
        // The size is reported when the device has answered what this run has sent.
        let is_quiet = !self.is_changing(worker) && !self.deflate.lock().is_pending();
        if is_quiet && (is_alive || read.is_some()) {
            self.report(worker, step)?;
        }

        // The memory first, the news of it later: a host that is busy reading keeps the guest's
        // CPUs waiting. (QEMU handles a queue, like every access to a device, under one lock.)
        if again != Some(0) {
            deflate::tell_backlog(&self.deflate);
            self.moves().tell(&mut worker.inflate, &self.deflate);
        }

        // What was answered in the meantime is taken in the next run.
        if !worker.inflate.queue.sleep() | !self.deflate.lock().queue.sleep() {
            self.queue_used();
            again = Some(0);
        }

        if self.is_broken(worker) {
            return Err(EIO);
        }

        // Interrupts come when most of what is in flight has been answered, and a slow device takes
        // its time. And what this run has found in its way may be gone by now, with the answers that
        // the OOM notifier has taken.
        if step != Step::Rest
            || worker.inflate.in_flight() > 0
            || self.deflate.lock().is_pending()
            || !self.moves().is_settled()
            || self.target_changed.load(Relaxed) && !self.giving_back.load(Relaxed)
        {
            again.get_or_insert(LOOK_AGAIN);
        }

        Ok(again)
    }
}

impl Task<Balloon> {
    /// Has the balloon follow the settings, which have changed.
    pub(crate) fn settings_changed(&self) {
        self.settings_changed.store(true, Release);
        self.schedule();
    }
}

/// Returns how many kernel pages `node` can give, so that it keeps its share of a `floor` that is to
/// be available to the guest.
fn room(node: Node, floor: usize) -> usize {
    let present = Node::all().map(Node::present_pages).sum();
    let share = target::part(floor, node.present_pages(), present);

    node.available_pages().saturating_sub(share)
}

impl Show for Task<Balloon> {
    /// Writes a line for each number that is worth knowing. Sizes are in kernel pages.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worker = self.worker.lock();
        let target = self.target(&worker);

        writeln!(f, "target {target}")?;
        writeln!(f, "held {}", self.pages.len())?;
        writeln!(f, "inflating {}", worker.inflate.in_flight())?;
        writeln!(f, "deflating {}", self.deflate.lock().leaving())?;
        if let Some(taker) = &self.taker {
            writeln!(f, "memory_blocks {}", taker.blocks())?;
        }
        for (order, blocks) in self.pages.by_order().iter().enumerate() {
            writeln!(f, "order_{order}_blocks {blocks}")?;
        }
        let reason = self.stop_reason(&worker, self.step(&worker, target));
        let reason = reason.map_or("none", StopReason::words);
        writeln!(f, "stop_reason {reason}")?;
        match worker.error {
            Some(error) => writeln!(f, "last_error {error:?}"),
            None => writeln!(f, "last_error none"),
        }
    }
}

impl OomNotify for Task<Balloon> {
    /// That of virtio_balloon.
    const PRIORITY: c_int = 80;

    /// Gives a part of the balloon back at once: enough for the guest to go on for a while.
    fn out_of_memory(&self) -> usize {
        // What is not in the balloon yet goes first, and the device need not know of it.
        let given = self.taker.as_ref().map_or(0, |taker| taker.cancel());
        if given > 0 {
            self.given_for_oom.add(given, Relaxed);
            self.schedule();
            return given;
        }
        // An allocation may be bound to a node: memory of another one would not help it.
        let there = self.pages.len_where_needed();
        if self.giving_back.load(Relaxed) || there == 0 {
            return 0;
        }

        let still = self.moves().hold_still();
        let wanted = (there / 8).max(OOM_SHARE);
        let released = deflate::release(
            &self.deflate,
            &self.pages,
            &mut self.oom_batch.lock(),
            wanted,
            Reason::OutOfMemory,
            &still,
        );
        drop(still);

        if released > 0 {
            self.given_for_oom.add(released, Relaxed);
            self.schedule();
        }

        let is_over = || deflate::is_over(&self.deflate, &self.pages).then_some(());
        if within(OOM_PATIENCE, is_over).is_none() {
            return 0;
        }
        // The device need not interrupt for an answer that was taken here.
        self.queue_used();
        self.schedule();
        released
    }
}

impl GoingOffline for Task<Balloon> {
    /// Gives the blocks that lie there back: single pages are moved by the kernel. The balloon
    /// takes others then.
    fn going_offline(&self, pfns: Range<u64>) -> Result {
        let mut worker = self.worker.lock();

        if let Some(taker) = &self.taker {
            taker.cancel();
        }
        // A block may be on its way into the balloon. And the kernel tries over and over to move
        // single pages which cannot be moved: those that the device has not answered for.
        within(PATIENCE, || {
            let answers =
                worker.inflate.collect(&self.pages) + deflate::collect(&self.deflate, &self.pages);
            // The device need not interrupt for an answer that was taken before.
            if answers > 0 {
                self.queue_used();
            }
            deflate::tell_backlog(&self.deflate);
            self.moves().tell(&mut worker.inflate, &self.deflate);
            (worker.inflate.in_flight() == 0
                && !self.deflate.lock().is_pending()
                && self.moves().is_settled())
            .then_some(())
        })
        .ok_or(EBUSY)?;

        let before = self.pages.len();
        // Nothing more comes of the work, and no page is moved any more.
        if before > 0 && (worker.error.is_some() || self.is_broken(&worker)) {
            return Err(EBUSY);
        }
        let all = deflate::evacuate(&self.deflate, &self.pages, &mut worker.batch, &pfns);
        if self.pages.len() == before {
            return all.then_some(()).ok_or(EBUSY);
        }

        let answered = within(PATIENCE, || {
            deflate::is_answered(&self.deflate, &self.pages).then_some(())
        });
        if answered.is_some() {
            self.queue_used();
        }
        drop(worker);

        self.schedule();
        (all && answered.is_some()).then_some(()).ok_or(EBUSY)
    }
}

impl Job for Balloon {
    fn run(task: &Task<Self>) {
        let mut worker = task.worker.lock();

        match task.advance(&mut worker) {
            Ok(Some(delay)) => task.schedule_in(delay),
            Ok(None) => (),
            Err(error) => {
                task.wakeup.lower(Signal::Target);
                // The device would not learn of any, and until it has no page leaves the balloon.
                task.moves().allow(false);
                if let Some(taker) = &task.taker {
                    taker.cancel();
                }
                if worker.error.is_none() {
                    dev_err!(
                        task.dev,
                        "a queue is broken ({:?}): no more ballooning until the driver is bound again\n",
                        error
                    );
                    worker.error = Some(error);
                }
            }
        }
    }
}

/// Waits for `condition`, but not longer than `time`.
fn within<T>(time: Delta, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::<Monotonic>::now();

    loop {
        let result = condition();

        if result.is_some() || start.elapsed() > time {
            return result;
        }
        fsleep(Delta::from_millis(1));
    }
}

/// Converts kernel pages to MiB.
fn mib(pages: usize) -> usize {
    pages >> (20 - PAGE_SHIFT)
}
