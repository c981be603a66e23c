// SPDX-License-Identifier: GPL-2.0

//! The state of a balloon, and its queries.
//!
//! Lock order: [`Balloon::worker`] or [`Balloon::oom_batch`], then [`Balloon::deflate`], then
//! [`PendingMigrations`]'s lock and the balloon core's `balloon_pages_lock`, one at a time. Memory
//! is allocated under the first one only. Of the kernel's notifiers that free memory, only the one
//! for memory offlining takes it.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        config_space::ConfigSpace,
        events::Events,
        migration::{
            Migration,
            PendingMigrations, //
        },
        policy::{
            growth::Growth,
            stop_reason::StopReason,
            target::Step, //
        },
        progress::Progress,
        queues::{
            deflate::Deflate,
            inflate::Inflate, //
        }, //
    },
    device::{
        announced,
        log_limit::LogLimit,
        settings::Settings,
        timeouts, //
    },
    messages::{
        balloon_page,
        message::MessageQueue,
        negotiated::Negotiated, //
    },
    rust::{
        mm::{
            balloon::balloon_pages::BalloonPages,
            memory,
            node::Node,
            pages::batch::Batch, //
        },
        virtio,
        virtio_balloon,
        work::{
            poll::StallTimeout,
            task::{
                new_slot,
                Slot,
                Task, //
            },
            wakeup::{
                WakeReason,
                WakeupSource, //
            }, //
        }, //
    },
    sources::{
        memory_blocks::Offliner,
        nodes, //
    }, //
};

use core::mem;
use kernel::{
    device::Core,
    new_mutex,
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// A memory balloon.
#[pin_data]
pub(crate) struct Balloon {
    pub(super) dev: ARef<virtio::Device>,
    wakeup: Arc<WakeupSource>,
    settings: Arc<Settings>,

    /// Why the balloon is smaller than the target, as a number of the protocol.
    reason: Atomic<u32>,

    pub(super) pages: BalloonPages<PendingMigrations>,

    /// Takes memory blocks, if the kernel zeroes the memory that it allocates.
    pub(super) offliner: Option<Arc<Task<Offliner>>>,

    /// The state of the control loop. Its task holds the lock for a run; teardown, the notifier of
    /// memory offlining and the status in sysfs take it, too.
    #[pin]
    pub(super) worker: Mutex<Worker>,

    #[pin]
    pub(super) deflate: SpinLock<Deflate>,

    /// Sorts pages when the guest has run out of memory.
    #[pin]
    pub(super) oom_batch: Mutex<Batch>,

    /// How long OOM notifiers wait for a device that must be notified first.
    pub(super) oom_timeout: StallTimeout,

    /// What the task does not know yet.
    pub(super) events: Events,

    /// Set to deflate everything, whatever the target.
    pub(super) quiescing: Atomic<bool>,

    /// The start of the clock.
    start: Instant<Monotonic>,
}

/// The state of the control loop.
pub(super) struct Worker {
    dev: virtio::Handle,
    pub(super) config: ConfigSpace,
    pub(super) inflate: Inflate,
    /// Sorts pages.
    pub(super) batch: Batch,
    pub(super) growth: Growth,
    pub(super) progress: Progress,
    /// The error that has ended all work, and was logged.
    pub(super) error: Option<Error>,
    pub(super) log_limit: LogLimit,
}

/// Sets up what exists for as long as the device is not reset.
fn set_up(
    dev: &virtio::Device<Core<'_>>,
    inflate: MessageQueue<Migration>,
    deflate: MessageQueue<Migration>,
) -> Result<(Worker, Deflate)> {
    Ok((
        Worker {
            dev: dev.handle()?,
            config: ConfigSpace::new(dev)?,
            inflate: Inflate::new(inflate),
            batch: Batch::new()?,
            growth: Growth::new(),
            progress: Progress::new(),
            error: None,
            log_limit: LogLimit::new(),
        },
        Deflate::new(deflate, Negotiated::of(dev)),
    ))
}

impl Balloon {
    /// Returns an initialiser for an empty balloon in `slot`.
    pub(crate) fn new(
        slot: &Slot<Self>,
        dev: &virtio::Device<Core<'_>>,
        inflate: MessageQueue<Migration>,
        deflate: MessageQueue<Migration>,
        settings: Arc<Settings>,
        wakeup: Arc<WakeupSource>,
    ) -> Result<impl PinInit<Self, Error>> {
        let (worker, deflate) = set_up(dev, inflate, deflate)?;
        // With deflate on OOM the balloon's memory still counts as the guest's.
        let adjust_managed = !dev.has_feature(virtio_balloon::F_DEFLATE_ON_OOM);
        if !settings.inflate() {
            dev_info!(
                dev,
                "{}: the balloon stays empty\n",
                StopReason::Excluded.words()
            );
        }

        let offliner = Offliner::new(
            |tasks| new_slot!(c"virtio_balloon_rs_blocks", tasks),
            "blocks",
            dev,
            &settings,
            usize::MAX,
            Negotiated::of(dev).end(),
            slot.waker(),
        )?;
        let migrations = PendingMigrations::new(slot.waker(), Negotiated::of(dev))?;
        let pages = BalloonPages::new(adjust_managed, migrations)?;
        let oom_batch = Batch::new()?;
        let dev = (&**dev).into();

        Ok(try_pin_init!(Self {
            dev,
            wakeup,
            settings,
            reason: Atomic::new(StopReason::value(None)),
            pages,
            offliner,
            worker <- new_mutex!(worker, "Balloon::worker"),
            deflate <- new_spinlock!(deflate, "Balloon::deflate"),
            oom_batch <- new_mutex!(oom_batch, "Balloon::oom_batch"),
            oom_timeout: StallTimeout::new(timeouts::OOM),
            events: Events::new(),
            quiescing: Atomic::new(false),
            start: Instant::now(),
        }))
    }

    /// Continues with a device that was reset. The task must not be running.
    pub(crate) fn attach(
        &self,
        dev: &virtio::Device<Core<'_>>,
        inflate: MessageQueue<Migration>,
        deflate: MessageQueue<Migration>,
    ) -> Result {
        let (worker, deflate) = set_up(dev, inflate, deflate)?;

        self.migrations().reset(Negotiated::of(dev))?;
        *self.worker.lock() = worker;
        // The old state is dropped after the lock was released, since that may sleep.
        let _before = mem::replace(&mut *self.deflate.lock(), deflate);

        self.quiescing.store(false, Relaxed);
        self.bring_blocks_online();
        Ok(())
    }

    /// Retries to bring memory blocks online, in the offliner's task.
    pub(super) fn bring_blocks_online(&self) {
        if let Some(offliner) = &self.offliner {
            offliner.restore();
        }
    }

    pub(super) fn migrations(&self) -> &PendingMigrations {
        self.pages.replacer()
    }

    /// Notes that the device has just used buffers.
    pub(crate) fn queue_used(&self) {
        self.events.queue_used();
        self.oom_timeout.progress();
    }

    /// Notes that the device may have a new target.
    pub(crate) fn target_changed(&self) {
        self.events.target_changed();
        self.wakeup.hold(WakeReason::Target);
    }

    /// The device's target, in kernel pages, as it was read last.
    pub(crate) fn host_target(&self) -> usize {
        balloon_page::pages(self.worker.lock().config.target())
    }

    /// Returns the balloon's size in kernel pages. Pages that the guest cannot use yet count.
    pub(crate) fn size(&self) -> usize {
        self.pages.len() + self.leaving()
    }

    /// Returns how many kernel pages are neither in the balloon nor free.
    pub(super) fn leaving(&self) -> usize {
        let deflating = self.deflate.lock().leaving();

        deflating + self.migrations().leaving()
    }

    /// Returns why the balloon is smaller than the target, as a number of the protocol.
    pub(crate) fn reason(&self) -> u32 {
        self.reason.load(Relaxed)
    }

    /// Announces `reason` in the guest, unless it was announced last.
    pub(super) fn announce(&self, worker: &Worker, reason: Option<StopReason>) {
        let value = StopReason::value(reason);

        if self.reason.xchg(value, Relaxed) != value {
            announced::STOP_REASON.announce(&worker.dev);
        }
    }

    /// Allows the system to suspend again, unless there is a new target that can be read.
    pub(super) fn relax(&self, worker: &Worker) {
        self.allow_suspend();

        // `target_changed` may have come in between.
        if self.events.has_target_changed() && !worker.config.is_unreadable() {
            self.wakeup.hold(WakeReason::Target);
        }
    }

    /// Allows the system to suspend again: the driver does not follow the target any more.
    pub(super) fn allow_suspend(&self) {
        self.wakeup.release(WakeReason::Target);
    }

    /// Returns the time in milliseconds.
    pub(super) fn now(&self) -> i64 {
        self.start.elapsed().as_millis()
    }

    /// Returns the settings of the device.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Notes that the settings have changed.
    pub(super) fn settings_changed(&self) {
        self.events.settings_changed();
    }

    /// Returns whether a queue is broken, so that all work has ended.
    pub(super) fn is_broken(&self, worker: &Worker) -> bool {
        worker.inflate.queue.is_broken() || self.deflate.lock().queue.is_broken()
    }

    /// Reads the target if the device has changed its configuration space, and not more often.
    /// Returns whether the target has changed, if it was read.
    pub(super) fn read_target(&self, worker: &mut Worker) -> Result<Option<bool>> {
        if self.quiescing.load(Relaxed) || !self.events.take_target_changed() {
            return Ok(None);
        }

        match worker.config.read_target() {
            Ok(has_changed) => Ok(Some(has_changed)),
            Err(EAGAIN) => {
                self.events.target_changed();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the target in kernel pages.
    pub(super) fn target(&self, worker: &Worker) -> usize {
        if self.quiescing.load(Relaxed) || !self.settings.inflate() {
            0
        } else {
            balloon_page::pages(worker.config.target())
        }
    }

    /// Returns the kernel pages that are available above the reserve.
    pub(super) fn available_above_reserve(&self) -> usize {
        let floor = self.settings.floor_pages();
        let nodes: usize = Node::all().map(|node| nodes::room(node, floor)).sum();

        memory::available_pages().saturating_sub(floor).min(nodes)
    }

    /// Returns the step towards `target` kernel pages in the balloon.
    pub(super) fn step(&self, worker: &Worker, target: usize) -> Step {
        Step::towards(target, self.pages.len(), worker.inflate.in_flight())
    }

    /// Returns why the balloon is below the target, if `step` is next.
    pub(super) fn stop_reason(&self, worker: &Worker, step: Step) -> Option<StopReason> {
        match step {
            _ if !self.settings.inflate() => {
                (worker.config.target() > 0).then_some(StopReason::Excluded)
            }
            Step::Inflate(_) => worker.growth.stopped(),
            Step::Deflate(_) | Step::Rest => None,
        }
    }

    /// Returns whether the balloon's size depends on unacknowledged messages. Pages that the guest
    /// cannot use yet count as being in the balloon.
    pub(super) fn is_changing(&self, worker: &Worker) -> bool {
        worker.inflate.in_flight() > 0 || self.leaving() > 0
    }

    /// Reports the balloon's size, and the stop reason with `step`, if they have changed. For when
    /// the device has just responded, or accepts messages.
    pub(super) fn report(&self, worker: &mut Worker, step: Step) -> Result {
        let reason = self.stop_reason(worker, step);
        let Worker {
            config, inflate, ..
        } = worker;

        config.report(self.size(), reason, &mut inflate.queue)
    }
}

/// Converts kernel pages to MiB.
pub(super) fn mib(pages: usize) -> usize {
    pages >> (20 - PAGE_SHIFT)
}
