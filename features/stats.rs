// SPDX-License-Identifier: GPL-2.0

//! Memory statistics for the host.
//!
//! The roles are swapped on this queue: the device always owns one buffer, and uses it to request
//! new statistics. The driver then fills it and makes it available again.
//!
//! Specification: clause 5.5.6.3, Memory Statistics.

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
    rust::{
        mm::info::Info,
        virtio::{
            self,
            ByteOrder,
            Virtqueue, //
        },
        virtio_balloon::{
            stat,
            Stat, //
        },
        work::{
            task::{
                new_slot,
                Job,
                Task, //
            },
            wakeup::{
                WakeReason,
                WakeupSource, //
            }, //
        }, //
    }, //
};

use kernel::{
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// A virtqueue for statistics.
type StatsQueue = Virtqueue<KVec<Stat>>;

/// The statistics queue.
#[pin_data]
pub(crate) struct Stats {
    byte_order: ByteOrder,
    wakeup: Arc<WakeupSource>,
    /// Set when the device may have sent a request since the task began to run.
    is_asked: Atomic<bool>,
    #[pin]
    inner: Mutex<Inner>,
}

struct Inner {
    queue: StatsQueue,
    /// The buffer while the device does not have it.
    buffer: Option<KVec<Stat>>,
}

impl Inner {
    fn new(queue: StatsQueue) -> Result<Self> {
        Ok(Self {
            queue,
            buffer: Some(new_buffer()?),
        })
    }
}

impl Stats {
    /// Sets up the feature, if it was negotiated.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        let Some(queue) = setup.queues.take(Queue::Stats)? else {
            return Ok(None);
        };
        let inner = Inner::new(queue)?;
        let slot = new_slot!(c"virtio_balloon_rs_stats", setup.tasks)?;
        let stats = try_pin_init!(Self {
            byte_order: setup.dev.byte_order(),
            wakeup: setup.wakeup.clone(),
            is_asked: Atomic::new(false),
            inner <- new_mutex!(inner, "Stats::inner"),
        });

        Ok(Some(Arc::pin_init(Task::new(slot, stats), GFP_KERNEL)?))
    }

    /// Answers a request of the device.
    fn answer(&self) {
        let mut inner = self.inner.lock();
        let used = inner.queue.next_used().map(|(buffer, _)| buffer);

        // If the device still owns the buffer, the interrupt was spurious.
        let Some(mut buffer) = used.or_else(|| inner.buffer.take()) else {
            return;
        };

        collect(&mut buffer, &Info::now(), self.byte_order);

        // There is room: this is the only buffer. If the queue is broken or the device gone, the
        // buffer is stored for the next device.
        match inner.queue.add(buffer) {
            Ok(()) => inner.queue.kick(),
            Err(buffer) => inner.buffer = Some(buffer),
        }
    }
}

impl Feature for Task<Stats> {
    /// The device gets its first buffer.
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.schedule();
    }

    /// The device may have sent a request. The system stays awake until the driver has answered.
    fn queue_used(&self) {
        self.is_asked.store(true, Release);
        self.wakeup.hold(WakeReason::Statistics);
        self.schedule();
    }

    /// Also allows the system to suspend.
    fn quiesce(&self, _begin: Instant<Monotonic>) -> Result {
        self.stop();
        self.wakeup.release(WakeReason::Statistics);
        Ok(())
    }

    fn shutdown(&self) {
        self.stop();
    }

    fn restore(&self, _dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        if let Some(queue) = queues.take(Queue::Stats)? {
            *self.inner.lock() = Inner::new(queue)?;
            self.resume();
        }
        Ok(())
    }
}

impl Job for Stats {
    fn run(task: &Task<Self>) {
        task.is_asked.xchg(false, Full);
        task.answer();
        task.wakeup.release(WakeReason::Statistics);

        // The device may have sent another request in between.
        if task.is_asked.load(Acquire) {
            task.wakeup.hold(WakeReason::Statistics);
        }
    }
}

/// Returns the value of a statistic, if this kernel counts it.
type Value = fn(&Info) -> Option<u64>;

/// A message: statistics with their tags.
const STATISTICS: &[(u16, Value)] = &[
    (stat::SWAP_IN, |info| info.swapped_in),
    (stat::SWAP_OUT, |info| info.swapped_out),
    (stat::MAJFLT, |info| info.major_faults),
    (stat::MINFLT, |info| info.faults),
    (stat::MEMFREE, |info| Some(info.free)),
    (stat::MEMTOT, |info| Some(info.total)),
    (stat::AVAIL, |info| Some(info.available)),
    (stat::CACHES, |info| Some(info.caches)),
    (stat::HTLB_PGALLOC, |info| info.hugetlb_allocations),
    (stat::HTLB_PGFAIL, |info| info.hugetlb_failures),
    (stat::OOM_KILL, |info| info.oom_kills),
    (stat::ALLOC_STALL, |info| info.allocation_stalls),
    (stat::ASYNC_SCAN, |info| Some(info.async_scanned)),
    (stat::DIRECT_SCAN, |info| Some(info.direct_scanned)),
    (stat::ASYNC_RECLAIM, |info| Some(info.async_reclaimed)),
    (stat::DIRECT_RECLAIM, |info| Some(info.direct_reclaimed)),
];

/// Returns an empty buffer with room for all statistics.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn new_buffer() -> Result<KVec<Stat>> {
    Ok(KVec::with_capacity(STATISTICS.len(), GFP_KERNEL)?)
}

/// Fills `buffer` with the numbers in `info`: always the same ones, in the same order. Numbers that
/// this kernel does not count are omitted.
pub(crate) fn collect(buffer: &mut KVec<Stat>, info: &Info, order: ByteOrder) {
    buffer.clear();
    for (tag, value) in STATISTICS {
        if let Some(value) = value(info) {
            // `new_buffer` has made room.
            let _ = buffer.push_within_capacity(Stat::new(*tag, value, order));
        }
    }
}
