// SPDX-License-Identifier: GPL-2.0

//! Free page hinting as a feature of a device, and its OOM notifier and shrinker.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::{
            Feature,
            Setup, //
        },
        oom_order,
        queues::{
            Queue,
            Queues, //
        }, //
    },
    features::hinting::{
        task::Hinting,
        worker::{
            Worker,
            WORTHWHILE, //
        }, //
    },
    rust::{
        mm::memory,
        notifiers::{
            oom::{
                OomNotifier,
                OomNotify, //
            },
            shrinker::{
                Shrink,
                Shrinker, //
            }, //
        },
        virtio,
        work::task::Task, //
    }, //
};

use kernel::{
    device::Core,
    prelude::*,
    sync::{
        atomic::{
            Relaxed,
            Release, //
        },
        Arc, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// Free page hinting of a bound device, with its registrations.
pub(crate) struct Hints {
    _oom: Pin<KBox<OomNotifier<Task<Hinting>>>>,
    _shrinker: Shrinker<Task<Hinting>>,
    task: Arc<Task<Hinting>>,
}

impl Hints {
    /// Sets up the feature, if it was negotiated.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or the error of [`virtio::Device::config`].
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        let Some(queue) = setup.queues.take(Queue::Hint)? else {
            return Ok(None);
        };
        let task = Hinting::new(setup, queue)?;
        let hints = Self {
            _oom: KBox::pin_init(OomNotifier::new(task.clone()), GFP_KERNEL)?,
            _shrinker: Shrinker::new(task.clone(), c"virtio_balloon_rs")?,
            task,
        };

        Ok(Some(Arc::new(hints, GFP_KERNEL)?))
    }
}

impl Feature for Hints {
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.config_changed();
    }

    fn queue_used(&self) {
        self.task.schedule();
    }

    /// The device may have a new id.
    fn config_changed(&self) {
        self.task.id_changed.store(true, Release);
        self.task.schedule();
    }

    fn quiesce(&self, _begin: Instant<Monotonic>) -> Result {
        let task = &self.task;

        task.stop();
        task.worker.lock().free_pending();
        task.release(usize::MAX);
        task.offliner.iter().for_each(|offliner| offliner.quiesce());
        Ok(())
    }

    fn shutdown(&self) {
        self.task.stop();
        self.task
            .offliner
            .iter()
            .for_each(|offliner| offliner.stop());
    }

    fn after_reset(&self) {
        let mut worker = self.task.worker.lock();

        worker.in_flight = 0;
        drop(worker.queue.detach_unused());
    }

    fn restore(&self, dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        let task = &self.task;
        let Some(queue) = queues.take(Queue::Hint)? else {
            return Ok(());
        };

        *task.worker.lock() = Worker::new(dev, queue, task.offliner.clone())?;
        task.offliner.iter().for_each(|offliner| offliner.restore());
        task.resume();
        Ok(())
    }

    fn give_up(&self) {
        self.task
            .offliner
            .iter()
            .for_each(|offliner| offliner.restore());
    }
}

impl Shrink for Task<Hinting> {
    fn count(&self) -> usize {
        self.held.lock().pages()
    }

    fn scan(&self, wanted: usize) -> usize {
        self.needed.store(true, Relaxed);
        self.release(wanted)
    }
}

impl OomNotify for Task<Hinting> {
    const PRIORITY: c_int = oom_order::HINTS;

    /// Waits for hints in flight, which the device uses soon: QEMU holds a lock for 50 ms at a
    /// time. The shrinker has already returned used hints. If the wait is in vain, the kernel kills
    /// a process, and later calls do not wait until the device has used a buffer.
    fn out_of_memory(&self) -> usize {
        self.needed.store(true, Relaxed);
        let before = memory::free_pages();

        self.oom_timeout
            .poll(|| {
                // The task itself may be allocating, in the transport.
                let mut worker = self.worker.try_lock()?;
                let freed =
                    self.collect(&mut worker) + worker.free_pending() + self.release(usize::MAX);

                if freed == 0 && worker.in_flight == 0 {
                    // The task may have freed memory meanwhile. Then the kernel need not kill a
                    // process.
                    let freed = memory::free_pages().saturating_sub(before);

                    return Some(if freed >= WORTHWHILE { freed } else { 0 });
                }
                (freed > 0).then_some(freed)
            })
            .unwrap_or(0)
    }
}
