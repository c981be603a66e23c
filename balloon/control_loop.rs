// SPDX-License-Identifier: GPL-2.0

//! The control loop: compares the balloon's size with the target, and inflates or deflates.
//!
//! It never waits for the device. Each run of the task takes the used buffers, makes as many
//! messages available as the queues have room for, and returns. The device's next interrupt, a new
//! target or the end of a pause starts the next run. So an unresponsive device cannot hang
//! anything.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        policy::target::Step,
        queues::{
            deflate,
            migration_reports, //
        },
        state::{
            mib,
            Balloon,
            Worker, //
        }, //
    },
    device::timeouts,
    rust::work::task::{
        Job,
        Task, //
    }, //
};

use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::Msecs, //
};

/// What a run has found.
struct Found {
    /// Whether the target was read.
    target_read: bool,
    /// Whether the device has just used a buffer: only a run soon after that may report the final
    /// size.
    is_alive: bool,
}

impl Balloon {
    /// Does the work that is possible now. Returns after how many milliseconds to run again without
    /// an event.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `EIO` if a queue is broken.
    pub(super) fn advance(&self, worker: &mut Worker) -> Result<Option<Msecs>> {
        worker.inflate.queue.disable_callback();
        self.deflate.lock().queue.disable_callback();

        let found = self.collect_events(worker)?;
        self.note_oom(worker);

        let target = self.target(worker);
        let step = self.step(worker, target);
        let is_there = step == Step::Rest && !self.is_changing(worker);
        let may_report = found.is_alive || worker.config.may_always_report();
        if may_report && (is_there || worker.config.is_report_due()) {
            self.report(worker, step)?;
        }

        let mut again = self.act(worker, target, step);
        self.settle(worker, step);

        self.announce(worker, self.stop_reason(worker, step));
        // The size is reported when the device has acknowledged the messages of this run.
        let is_quiet = !self.is_changing(worker) && !self.deflate.lock().is_pending();
        if is_quiet && (may_report || found.target_read) {
            self.report(worker, step)?;
        }

        // Free first, notify later: while QEMU reads a queue it holds the lock for all accesses to
        // devices, and the guest's CPUs wait for that lock.
        if again != Some(0) {
            deflate::send_backlog(&self.deflate);
            migration_reports::send(self.migrations(), &mut worker.inflate, &self.deflate);
        }
        worker.inflate.queue.notify();
        while worker.inflate.queue.take_surplus().is_some() {}
        deflate::free_surplus(&self.deflate);

        // The next run takes buffers that were used in the meantime.
        if !worker.inflate.queue.enable_callback_delayed()
            | !self.deflate.lock().queue.enable_callback_delayed()
        {
            self.queue_used();
            again = Some(0);
        }
        if self.is_broken(worker) {
            return Err(EIO);
        }
        if self.is_waiting(worker, step) {
            again.get_or_insert(timeouts::MISSED_INTERRUPT);
        }
        Ok(again)
    }

    /// Takes used buffers and reads a changed target.
    fn collect_events(&self, worker: &mut Worker) -> Result<Found> {
        worker.inflate.collect(&self.pages);
        deflate::collect(&self.deflate, &self.pages);
        // The notifiers take used buffers as well.
        let used = [
            worker.inflate.queue.used(),
            self.deflate.lock().queue.used(),
        ];
        // Read the clock once: the task may lose the processor for longer than a response counts.
        let now = self.now();
        let just_used = self.events.take_queue_used();
        let response = worker.progress.collect(now, used, just_used);

        // A configuration change has other reasons, too, such as hints.
        let target = self.read_target(worker)?;
        let target_changed = target == Some(true);
        if target_changed | self.events.take_settings_changed() {
            worker.growth.restart();
        }
        if target_changed || response.has_used {
            worker.progress.restart();
        }

        Ok(Found {
            target_read: target.is_some(),
            is_alive: response.is_alive || worker.inflate.has_just_responded(),
        })
    }

    /// Begins a pause after the OOM notifier has deflated the balloon.
    fn note_oom(&self, worker: &mut Worker) {
        if !self.events.take_out_of_memory() {
            return;
        }
        if worker.growth.fail_after_oom(self.now()) && worker.log_limit.allows() {
            dev_info!(
                self.dev,
                "out of memory: deflated to {} MiB, not growing for 10 seconds or longer\n",
                mib(self.pages.len())
            );
        }
    }

    /// Makes one step. Returns after how many milliseconds to run again for the rest.
    fn act(&self, worker: &mut Worker, target: usize, step: Step) -> Option<Msecs> {
        if step != Step::Rest {
            self.migrations().allow(false);
        }
        if let (Some(offliner), Step::Deflate(_) | Step::Rest) = (&self.offliner, step) {
            offliner.cancel();
        }

        let again = match step {
            Step::Inflate(wanted) => self.grow(worker, target, wanted),
            Step::Deflate(wanted) => self.shrink(worker, wanted),
            Step::Rest => {
                worker.growth.rest();
                None
            }
        };
        if again != Some(0) {
            worker.batch.shrink();
        }
        again
    }

    /// Allows page migration and suspend if the balloon does not change its size.
    fn settle(&self, worker: &mut Worker, step: Step) {
        // Also while the balloon cannot grow, which may last forever.
        let resting = step == Step::Rest || worker.growth.is_failing();
        let are_settled = self.migrations().is_settled();
        let are_stuck = worker.progress.are_migrations_stuck(are_settled);

        if resting {
            let is_usable = worker.error.is_none() && !self.quiescing.load(Relaxed);

            // Page migration would otherwise retry until an unresponsive device answers.
            self.migrations().allow(is_usable && !are_stuck);
        }
        if resting || worker.progress.is_unresponsive() {
            self.relax(worker);
        }
    }

    /// Returns whether the task waits for an event that may come without an interrupt. The device
    /// interrupts when it has used most of the buffers in flight, and the OOM notifier takes used
    /// buffers, too.
    fn is_waiting(&self, worker: &Worker, step: Step) -> bool {
        step != Step::Rest
            || worker.inflate.in_flight() > 0
            || self.deflate.lock().is_pending()
            || !self.migrations().is_settled()
            || self.events.has_target_changed() && !self.quiescing.load(Relaxed)
    }
}

impl Job for Balloon {
    fn run(task: &Task<Self>) {
        let mut worker = task.worker.lock();

        match task.advance(&mut worker) {
            Ok(Some(delay)) => task.schedule_in(delay),
            Ok(None) => (),
            Err(error) => {
                task.allow_suspend();
                // The driver could not report migrations, and no page may leave the balloon before
                // it has.
                task.migrations().allow(false);
                if let Some(offliner) = &task.offliner {
                    offliner.cancel();
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
