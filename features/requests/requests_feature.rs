// SPDX-License-Identifier: GPL-2.0

//! Host requests as a feature of a device.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::{
            Feature,
            Setup, //
        },
        queues::{
            Queue,
            Queues, //
        }, //
    },
    features::requests::{
        counters::Counters,
        queue::Inner,
        task::HostRequests, //
    },
    rust::{
        virtio,
        work::task::{
            new_slot,
            Task,
            TaskQueue, //
        }, //
    },
    sources::memory_blocks::Offliner, //
};

use core::mem;
use kernel::{
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// How many kernel pages of memory blocks may be ready for the next messages.
const MOST_READY: usize = 1;

/// Sets up the feature, if it was negotiated.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
    let Some(queue) = setup.queues.take(Queue::Request)? else {
        return Ok(None);
    };
    // Discards wait for page migration, as the offliner does.
    let tasks = TaskQueue::without_rescuer("requests", setup.dev.as_ref())?;
    let slot = new_slot!(c"virtio_balloon_rs_requests", tasks)?;
    let waker = slot.waker();
    let offliner = Offliner::new(
        |tasks| new_slot!(c"virtio_balloon_rs_discard", tasks),
        "discard",
        setup.dev,
        &setup.settings,
        MOST_READY,
        u64::MAX,
        waker.clone(),
    )?;
    let inner = Inner::new(setup.dev, queue)?;
    let requests = try_pin_init!(HostRequests {
        inner <- new_mutex!(inner, "HostRequests::inner"),
        spent: Arc::new(Atomic::new(0), GFP_KERNEL)?,
        waker,
        settings: setup.settings.clone(),
        offliner,
        counters <- Counters::new(&setup.dir),
        start: Instant::now(),
    });

    Ok(Some(Arc::pin_init(Task::new(slot, requests), GFP_KERNEL)?))
}

impl Feature for Task<HostRequests> {
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.schedule();
    }

    fn queue_used(&self) {
        self.schedule();
    }

    /// No request is open after that. Threads that drop caches or allocate memory are killed, and
    /// not waited for.
    fn quiesce(&self, _begin: Instant<Monotonic>) -> Result {
        self.stop();
        // First, since an offliner may wait for a thread of a request.
        self.inner.lock().open.clear();
        self.offliner.iter().for_each(|offliner| offliner.quiesce());
        self.counters.open.store(0, Relaxed);
        Ok(())
    }

    /// The threads do not concern the device.
    fn shutdown(&self) {
        self.stop();
        self.offliner.iter().for_each(|offliner| offliner.stop());
    }

    fn after_reset(&self) {
        drop(self.inner.lock().queue.detach_unused());
    }

    fn restore(&self, dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        let Some(queue) = queues.take(Queue::Request)? else {
            return Ok(());
        };
        let inner = Inner::new(dev, queue)?;
        let before = mem::replace(&mut *self.inner.lock(), inner);

        drop(before);
        self.offliner.iter().for_each(|offliner| offliner.restore());
        self.resume();
        Ok(())
    }

    fn give_up(&self) {
        self.offliner.iter().for_each(|offliner| offliner.restore());
    }
}
