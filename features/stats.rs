// SPDX-License-Identifier: GPL-2.0

//! Memory statistics for the host.
//!
//! The roles are swapped on this queue: the device always owns one buffer, and uses it to request
//! new statistics. The driver then fills it and makes it available again.
//!
//! With pressure notices (docs/protocol.md) the driver has a second buffer, and sends it without a
//! request when the guest is short of memory. The device then returns the older one.
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
        },
        timeouts, //
    },
    rust::{
        fs::debugfs,
        mm::info::Info,
        notifiers::shrinker::{
            Shrink,
            Shrinker, //
        },
        virtio::{
            self,
            ByteOrder,
            Virtqueue, //
        },
        virtio_balloon::{
            stat,
            Stat,
            F_PRESSURE, //
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
            Relaxed,
            Release, //
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

/// A virtqueue for statistics.
type StatsQueue = Virtqueue<KVec<Stat>>;

/// The statistics queue.
#[pin_data]
pub(crate) struct Stats {
    byte_order: ByteOrder,
    wakeup: Arc<WakeupSource>,
    /// How many buffers the driver has: a second one if it may send statistics unasked.
    buffers: usize,
    /// Set when the device may have sent a request since the task began to run.
    is_asked: Atomic<bool>,
    /// Set when the kernel has reclaimed memory since the last statistics.
    is_short: Atomic<bool>,
    /// How many statistics the device has not asked for.
    #[pin]
    notices: debugfs::File<Atomic<u64>>,
    #[pin]
    inner: Mutex<Inner>,
}

struct Inner {
    queue: StatsQueue,
    /// The buffers that the device does not have.
    spare: KVec<KVec<Stat>>,
    /// When the last notice was sent.
    noticed: Option<Instant<Monotonic>>,
}

impl Inner {
    fn new(queue: StatsQueue, buffers: usize) -> Result<Self> {
        let mut spare = KVec::with_capacity(buffers, GFP_KERNEL)?;

        for _ in 0..buffers {
            spare.push(new_buffer()?, GFP_KERNEL)?;
        }
        Ok(Self {
            queue,
            spare,
            noticed: None,
        })
    }

    /// Stores a buffer that the device does not have.
    fn put_back(&mut self, buffer: KVec<Stat>) {
        // There is room for all of them.
        let _ = self.spare.push_within_capacity(buffer);
    }

    /// Returns in how many milliseconds another notice may be sent.
    fn pause(&self) -> Msecs {
        self.noticed.map_or(0, |last| {
            let rest = timeouts::PRESSURE_NOTICES.as_millis() - last.elapsed().as_millis();

            rest.try_into().unwrap_or(0)
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
        let sends_notices = setup.dev.has_feature(F_PRESSURE);
        let buffers = 1 + usize::from(sends_notices);
        let inner = Inner::new(queue, buffers)?;
        let slot = new_slot!(c"virtio_balloon_rs_stats", setup.tasks)?;
        let stats = try_pin_init!(Self {
            byte_order: setup.dev.byte_order(),
            wakeup: setup.wakeup.clone(),
            buffers,
            is_asked: Atomic::new(false),
            is_short: Atomic::new(false),
            notices <- setup.dir.file(c"pressure_notices", Atomic::new(0)),
            inner <- new_mutex!(inner, "Stats::inner"),
        });
        let task = Arc::pin_init(Task::new(slot, stats), GFP_KERNEL)?;
        let shrinker = sends_notices
            .then(|| Shrinker::new(task.clone(), c"virtio_balloon_rs_pressure"))
            .transpose()?;

        let feature = StatsFeature {
            _shrinker: shrinker,
            task,
        };
        Ok(Some(Arc::new(feature, GFP_KERNEL)?))
    }

    /// Answers a request of the device, or notifies it that the guest is short of memory. Returns
    /// in how many milliseconds a notice may be sent.
    fn answer(&self) -> Option<Msecs> {
        let mut inner = self.inner.lock();
        while let Some((buffer, _)) = inner.queue.next_used() {
            inner.put_back(buffer);
        }
        // A device that still has a buffer requests nothing.
        let is_notice = inner.spare.len() < self.buffers;
        if is_notice {
            if inner.spare.is_empty() || !self.is_short.load(Relaxed) {
                return None;
            }
            match inner.pause() {
                0 => inner.noticed = Some(Instant::now()),
                pause => return Some(pause),
            }
        }
        let mut buffer = inner.spare.pop()?;

        // What happens from here on is for the next statistics.
        self.is_short.xchg(false, Full);
        collect(&mut buffer, &Info::now(), self.byte_order);

        // There is room in the queue. If it is broken, or the device gone or not ready, the buffer
        // is stored for later.
        match inner.queue.add(buffer) {
            Ok(()) => {
                self.notices.add(u64::from(is_notice), Relaxed);
                inner.queue.kick();
            }
            Err(buffer) => inner.put_back(buffer),
        }
        None
    }
}

/// Statistics of a bound device, with the registration for notices, which is dropped before its
/// task.
struct StatsFeature {
    _shrinker: Option<Shrinker<Task<Stats>>>,
    task: Arc<Task<Stats>>,
}

impl Feature for StatsFeature {
    /// The device gets its first buffer.
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.task.schedule();
    }

    /// The device may have sent a request. The system stays awake until the driver has answered.
    fn queue_used(&self) {
        self.task.is_asked.store(true, Release);
        self.task.wakeup.hold(WakeReason::Statistics);
        self.task.schedule();
    }

    /// Also allows the system to suspend.
    fn quiesce(&self, _begin: Instant<Monotonic>) -> Result {
        self.task.stop();
        self.task.wakeup.release(WakeReason::Statistics);
        Ok(())
    }

    fn shutdown(&self) {
        self.task.stop();
    }

    fn restore(&self, _dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        if let Some(queue) = queues.take(Queue::Stats)? {
            *self.task.inner.lock() = Inner::new(queue, self.task.buffers)?;
            self.task.resume();
        }
        Ok(())
    }
}

/// Owns no memory, and only learns that the kernel reclaims some: in the background, since free
/// memory is below a zone's low watermark, or for an allocation that waits. A container at its
/// limit does not count.
impl Shrink for Task<Stats> {
    fn count(&self) -> usize {
        // Reclaim calls this often, on all CPUs.
        if !self.is_short.load(Relaxed) && !self.is_short.xchg(true, Relaxed) {
            self.schedule();
        }
        0
    }

    fn scan(&self, _wanted: usize) -> usize {
        0
    }
}

impl Job for Stats {
    fn run(task: &Task<Self>) {
        task.is_asked.xchg(false, Full);
        let pause = task.answer();
        task.wakeup.release(WakeReason::Statistics);

        // The device may have sent another request in between.
        if task.is_asked.load(Acquire) {
            task.wakeup.hold(WakeReason::Statistics);
        }
        if let Some(pause) = pause {
            task.schedule_in(pause);
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
