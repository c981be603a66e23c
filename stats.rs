// SPDX-License-Identifier: GPL-2.0

//! Memory statistics for the host.
//!
//! The roles are swapped on this queue: the driver always has one buffer with the device, which
//! uses it when it wants new numbers. Then the driver fills it and offers it again.
//!
//! Specification: clause 5.5.6.3, Memory Statistics.

#![forbid(unsafe_code)]

use crate::rust::{
    memory,
    task::{
        Job,
        Task, //
    },
    virtio::ByteOrder,
    virtio_balloon::{
        stat,
        Stat, //
    },
    virtqueue::Virtqueue, //
};

use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex, //
};

/// A virtqueue for statistics.
pub(crate) type StatsQueue = Virtqueue<KVec<Stat>>;

/// The statistics queue.
#[pin_data]
pub(crate) struct Stats {
    byte_order: ByteOrder,
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
            buffer: Some(KVec::with_capacity(stat::KINDS, GFP_KERNEL)?),
        })
    }
}

impl Stats {
    /// Returns an initialiser for a queue that the device has no buffer of yet: the task has to run
    /// once.
    pub(crate) fn new(
        queue: StatsQueue,
        byte_order: ByteOrder,
    ) -> Result<impl PinInit<Self, Error>> {
        let inner = Inner::new(queue)?;

        Ok(try_pin_init!(Self {
            byte_order,
            inner <- new_mutex!(inner, "Stats::inner"),
        }))
    }

    /// Takes up the work again with the queue of a device that was reset. The task must not be
    /// running.
    pub(crate) fn attach(&self, queue: StatsQueue) -> Result {
        *self.inner.lock() = Inner::new(queue)?;
        Ok(())
    }
}

impl Job for Stats {
    fn run(task: &Task<Self>) {
        let mut inner = task.inner.lock();
        let used = inner.queue.next_used().map(|(buffer, _)| buffer);

        // If the device still has the buffer, it called without reason.
        let Some(mut buffer) = used.or_else(|| inner.buffer.take()) else {
            return;
        };

        collect(&mut buffer, task.byte_order);

        // There is room: this is the only buffer. If the queue is broken or the device gone, nobody
        // asks any more, and the buffer waits for the next device.
        match inner.queue.add(buffer) {
            Ok(()) => inner.queue.kick(),
            Err(buffer) => inner.buffer = Some(buffer),
        }
    }
}

/// Fills `buffer` with the numbers of this moment: always the same ones, in the same order.
fn collect(buffer: &mut KVec<Stat>, order: ByteOrder) {
    let info = memory::Info::now();

    buffer.clear();
    for (tag, value) in [
        (stat::SWAP_IN, info.swapped_in),
        (stat::SWAP_OUT, info.swapped_out),
        (stat::MAJFLT, info.major_faults),
        (stat::MINFLT, info.faults),
        (stat::MEMFREE, info.free),
        (stat::MEMTOT, info.total),
        (stat::AVAIL, info.available),
        (stat::CACHES, info.caches),
        (stat::HTLB_PGALLOC, info.hugetlb_allocations),
        (stat::HTLB_PGFAIL, info.hugetlb_failures),
        (stat::OOM_KILL, info.oom_kills),
        (stat::ALLOC_STALL, info.allocation_stalls),
        (stat::ASYNC_SCAN, info.async_scanned),
        (stat::DIRECT_SCAN, info.direct_scanned),
        (stat::ASYNC_RECLAIM, info.async_reclaimed),
        (stat::DIRECT_RECLAIM, info.direct_reclaimed),
    ] {
        // There is room for one of each kind.
        let _ = buffer.push_within_capacity(Stat::new(tag, value, order));
    }
}
