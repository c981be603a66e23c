// SPDX-License-Identifier: GPL-2.0

//! Free page hinting: a host that migrates the guest leaves free memory out.
//!
//! The host asks with an id. The driver answers with the id, takes free memory from the page
//! allocator, gives it to the device, and ends the round with the id [`HINT_STOP`]. It keeps the
//! memory until the host says [`HINT_DONE`], since whatever is written to it in between has to be
//! migrated after all.
//!
//! Memory that the device has not used yet is given back to nobody. A host that skips it clears its
//! dirty bits, and where the dirty log was set initially (all pages dirty, none of them
//! write-protected) that is the moment in which it begins to see writes: one that came before is
//! lost on the other side. A host that discards the memory would discard what its new owner wrote.
//! Memory that the device has used is free to go when the guest needs it.
//!
//! QEMU takes a lock for each buffer that its migration keeps for up to 50 ms at a time. So memory
//! is collected first, neighbouring blocks become one buffer, and the largest come first.
//!
//! A kernel with `init_on_alloc=1` writes to all memory that it allocates, which the host then has
//! to provide and to migrate. So hints are about memory blocks there, which the kernel does not
//! write to ([`memory_blocks`](crate::sources::memory_blocks)), unless the administrator forbids that.
//!
//! Lock order: [`Hinting::worker`], then [`Hinting::held`]. Memory is taken under the first one,
//! but without reclaim, and under the second one not at all: it is taken by those who reclaim.
//!
//! Specification: clause 5.5.6.5, Free Page Hinting.

#![forbid(unsafe_code)]

use crate::{
    balloon::oom,
    device::{
        feature::{
            Feature,
            Quiesce,
            Setup, //
        },
        queues::{
            Queue,
            Queues, //
        },
        settings::Settings,
        timeouts, //
    },
    rust::{
        fs::debugfs,
        mm::{
            memory,
            memory_blocks::MemoryBlock,
            page_list::MAX_ORDER,
            page_run::{
                PageRun,
                RunSet, //
            }, //
        },
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
        virtio::{
            self,
            ByteOrder,
            Either,
            Virtqueue, //
        },
        virtio_balloon::{
            HINT_DONE,
            HINT_ID,
            HINT_STOP, //
        },
        work::{
            poll::within,
            task::{
                new_slot,
                Job,
                Task, //
            }, //
        }, //
    },
    sources::memory_blocks::Taker, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    device::Core,
    new_mutex, new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::Msecs,
};

/// Returns the order of the smallest blocks that are taken. Less than a page block may come from a
/// page block of another type. The kernel would change its type, and raise a watermark.
pub(crate) fn min_order() -> u32 {
    memory::page_block_order()
}

/// Less than that, in kernel pages, is not worth another look for free memory: 4 MiB.
const WORTHWHILE: usize = 1 << (22 - PAGE_SHIFT);

/// How many entries of the queue are left for ids: one that ends a round, and one that begins the
/// next.
const ROOM_FOR_IDS: usize = 2;

/// How many kernel pages are given back under one hold of a lock, or a block more: 4 MiB, which may
/// have to be cleared.
const PAGES_PER_HOLD: usize = 1 << (22 - PAGE_SHIFT);

/// How many runs are kept at most for each entry of the queue.
pub(crate) const RUNS_PER_ENTRY: usize = 8;

/// A virtqueue for hints: ids and memory.
pub(crate) type HintQueue = Virtqueue<Either<KVec<u32>, PageRun>>;

/// Free page hinting of a device.
#[pin_data]
pub(crate) struct Hinting {
    byte_order: ByteOrder,
    settings: Arc<Settings>,
    /// What takes memory blocks, where that is better than to allocate memory.
    taker: Option<Arc<Task<Taker>>>,
    #[pin]
    worker: Mutex<Worker>,
    /// Memory that the device has used, and that is kept for as long as nobody needs it.
    #[pin]
    held: SpinLock<RunSet>,
    /// Set when the device has changed its configuration space, and the id was not read since.
    id_changed: Atomic<bool>,
    /// Set when somebody needed memory: there will be no more in this round.
    needed: Atomic<bool>,
    /// How much was hinted, in bytes.
    #[pin]
    hinted: debugfs::File<Atomic<u64>>,
}

struct Worker {
    config: virtio::Config,
    queue: HintQueue,
    taker: Option<Arc<Task<Taker>>>,
    /// The id that was read last.
    wanted: u32,
    /// The id of the latest round.
    id: u32,
    /// Whether the device has to be told that a round is over, and that the one with `id` begins.
    stop_due: bool,
    start_due: bool,
    /// Whether the round goes on, and whether there is more to be had for it.
    supplying: bool,
    more: bool,
    /// Whether what the device has used is kept.
    keeping: bool,
    /// Memory that the device is to be given.
    pending: RunSet,
    /// How many kernel pages the device has.
    in_flight: usize,
}

impl Worker {
    fn new(
        dev: &virtio::Device<Core<'_>>,
        queue: HintQueue,
        taker: Option<Arc<Task<Taker>>>,
    ) -> Result<Self> {
        let pending = RunSet::new(queue.size() * RUNS_PER_ENTRY)?;

        Ok(Self {
            config: dev.config()?,
            queue,
            taker,
            wanted: HINT_STOP,
            id: HINT_STOP,
            stop_due: false,
            start_due: false,
            supplying: false,
            more: false,
            keeping: false,
            pending,
            in_flight: 0,
        })
    }

    /// Ends the round, if there is one.
    fn stop(&mut self) {
        self.stop_due |= self.supplying;
        self.supplying = false;
        self.free_pending();
    }

    /// Gives back what the device was not given yet. Returns how many kernel pages it was.
    fn free_pending(&mut self) -> usize {
        let ready = self.taker.as_ref().map_or(0, |taker| taker.cancel());

        ready + self.pending.free(usize::MAX)
    }

    /// Begins to take memory blocks that are free, but not all of them, if any are taken.
    fn begin_blocks(&self, floor: usize) {
        if let Some(taker) = &self.taker {
            let _taking = memory::Taking::begin();
            let spare = memory::spare_pages(floor);

            taker.begin(spare - spare % MemoryBlock::pages() as usize);
        }
    }

    /// Takes over the blocks that are ready.
    fn take_blocks(&mut self) {
        let Some(taker) = &self.taker else { return };
        // What is ready when it is over is the last.
        self.more = taker.is_busy();
        let mut pages = taker.take_over(usize::MAX);

        while let Some(run) = PageRun::from_block(&mut pages) {
            if self.pending.insert(run).is_err() {
                break;
            }
        }
    }

    /// Returns whether memory blocks are being taken for this round.
    fn awaits_blocks(&self) -> bool {
        self.more && self.taker.is_some()
    }

    /// Sends the ids that are due. Returns whether none is left.
    fn send_ids(&mut self, order: ByteOrder) -> bool {
        if self.stop_due {
            self.stop_due = !self.send_id(HINT_STOP, order);
        }
        if self.start_due && !self.stop_due {
            self.start_due = !self.send_id(self.id, order);
        }

        !self.stop_due && !self.start_due
    }

    fn send_id(&mut self, id: u32, order: ByteOrder) -> bool {
        let Ok(mut buffer) = KVec::with_capacity(1, GFP_NOWAIT | __GFP_NOWARN) else {
            return false;
        };

        // There is room for one.
        let _ = buffer.push_within_capacity(order.to_device32(id));
        self.queue.add(Either::Left(buffer)).is_ok()
    }

    /// Takes memory that is free, but not all of it.
    fn gather(&mut self, floor: usize, needed: &Atomic<bool>) {
        let _taking = memory::Taking::begin();
        let mut wanted = memory::spare_pages(floor);
        if self.queue.room() <= ROOM_FOR_IDS {
            wanted = 0;
        }
        let mut order = MAX_ORDER;

        while !needed.load(Relaxed) {
            // A block may have as much as 512 MiB: with one that is larger than what is missing the
            // guest would have less than it is to keep.
            let missing = wanted.saturating_sub(self.pending.pages());
            order = order.min(missing.checked_ilog2().unwrap_or(0));
            if order < min_order() {
                break;
            }
            let Some(run) = PageRun::alloc(order) else {
                order -= 1;
                continue;
            };
            if self.pending.insert(run).is_err() {
                break;
            }
        }

        self.more = self.pending.pages() >= WORTHWHILE;
    }

    /// Gives the device as much as the queue has room for. Returns how many kernel pages it was.
    fn supply(&mut self) -> usize {
        let mut supplied = 0;

        while self.queue.room() > ROOM_FOR_IDS {
            let Some(run) = self.pending.take_longest() else {
                break;
            };
            let pages = run.len();

            if self.queue.add(Either::Right(run)).is_err() {
                break;
            }
            supplied += pages;
        }

        self.in_flight += supplied;
        supplied
    }
}

impl Hinting {
    /// Sets the feature up for `queue`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what [`virtio::Device::config`] says.
    fn new(setup: &Setup<'_, '_>, queue: HintQueue) -> Result<Arc<Task<Self>>> {
        let slot = new_slot!(c"virtio_balloon_rs_hint", setup.tasks)?;
        let held = RunSet::new(queue.size() * RUNS_PER_ENTRY)?;
        let taker = match setup.settings.memory_blocks() {
            true => {
                let slot_for_blocks = || new_slot!(c"virtio_balloon_rs_hint_blocks", setup.tasks);
                let settings = setup.settings.clone();
                Taker::new(
                    slot_for_blocks,
                    setup.dev,
                    settings,
                    usize::MAX,
                    slot.waker(),
                )?
            }
            false => None,
        };
        let worker = Worker::new(setup.dev, queue, taker.clone())?;
        let hinting = try_pin_init!(Self {
            byte_order: setup.dev.byte_order(),
            settings: setup.settings.clone(),
            taker,
            worker <- new_mutex!(worker, "Hinting::worker"),
            held <- new_spinlock!(held, "Hinting::held"),
            id_changed: Atomic::new(true),
            needed: Atomic::new(false),
            hinted <- setup.dir.file(c"hinted_bytes", Atomic::new(0)),
        });

        Arc::pin_init(Task::new(slot, hinting), GFP_KERNEL)
    }

    /// Gives back what is held. Returns how many kernel pages it was.
    fn release(&self) -> usize {
        let mut released = 0;

        loop {
            match self.held.lock().free(PAGES_PER_HOLD) {
                0 => return released,
                freed => released += freed,
            }
        }
    }

    /// Gives up: the device will hear of nothing that is kept for it.
    fn give_up(&self, worker: &mut Worker) {
        worker.stop();
        worker.keeping = false;
        self.release();
    }

    /// Takes what the device has used. Returns how many kernel pages of that are free.
    fn collect(&self, worker: &mut Worker) -> usize {
        let mut freed = 0;

        while let Some((buffer, _)) = worker.queue.next_used() {
            let Either::Right(run) = buffer else { continue };

            let pages = run.len();
            worker.in_flight -= pages;
            self.hinted.add((pages as u64) << PAGE_SHIFT, Relaxed);
            if worker.keeping {
                // If there is no room for it, it is freed, which is allowed now. It must not be taken
                // and hinted over and over: the round ends with what is there.
                let unheld = self.held.lock().insert(run);
                if unheld.is_err() {
                    freed += pages;
                    worker.more = false;
                }
            } else {
                freed += pages;
            }
        }

        freed
    }

    /// Reads the id if the device has changed its configuration space, and no more often.
    fn read_id(&self, worker: &mut Worker) -> Result {
        if self.id_changed.xchg(false, Full) {
            match worker.config.read_le32(HINT_ID) {
                Ok(id) => worker.wanted = id,
                Err(EAGAIN) => self.id_changed.store(true, Relaxed),
                Err(error) => return Err(error),
            }
        }

        Ok(())
    }

    /// Follows what the host wants.
    fn follow(&self, worker: &mut Worker) -> Result {
        self.read_id(worker)?;
        let wanted = worker.wanted;

        if wanted == HINT_STOP || wanted == HINT_DONE {
            worker.stop();
            if wanted == HINT_DONE {
                worker.keeping = false;
                self.release();
            }
        } else if wanted != worker.id {
            worker.stop();
            worker.id = wanted;
            worker.start_due = true;
            worker.supplying = true;
            worker.keeping = true;
            worker.more = true;
            self.needed.store(false, Relaxed);

            // What was hinted before is hinted again, as far as the guest can still do without it:
            // it may have been written to before the host began to look, and the host may know that
            // by now.
            self.release();
            memory::drain_free_lists();
            worker.begin_blocks(self.settings.floor_pages());
        } else if self.needed.load(Relaxed) {
            worker.stop();
        }

        Ok(())
    }

    /// Does what can be done now. Returns in how many milliseconds to come again, if nothing
    /// happens before.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `EIO` if the queue is broken.
    fn advance(&self, worker: &mut Worker) -> Result<Option<Msecs>> {
        worker.queue.disable_callback();
        self.collect(worker);
        if worker.queue.is_broken() {
            return Err(EIO);
        }
        self.follow(worker)?;

        // Whoever runs out of memory while this waits for its turn has nothing to gain here.
        let is_idle = worker.in_flight == 0 && worker.pending.pages() == 0;
        if worker.supplying && worker.awaits_blocks() {
            worker.take_blocks();
        } else if worker.supplying && worker.more && is_idle {
            worker.gather(self.settings.floor_pages(), &self.needed);
        }

        let mut sent = worker.stop_due || worker.start_due;
        if worker.send_ids(self.byte_order) && worker.supplying {
            let supplied = worker.supply();

            if supplied == 0 && worker.in_flight == 0 && !worker.awaits_blocks() {
                worker.stop();
                worker.send_ids(self.byte_order);
            }
            sent = true;
        }
        if sent {
            worker.queue.kick();
        }

        if worker.queue.is_broken() {
            return Err(EIO);
        }
        if worker.queue.in_flight() == 0 && !worker.stop_due && !worker.start_due {
            let is_read = !self.id_changed.load(Relaxed);
            return Ok((!is_read).then_some(timeouts::MISSED_INTERRUPT));
        }

        Ok(Some(match worker.queue.enable_callback_delayed() {
            false => 0,
            true if worker.supplying => timeouts::MISSED_HINT_INTERRUPT,
            true => timeouts::MISSED_INTERRUPT,
        }))
    }
}

/// Free page hinting of a bound device, with what calls it.
pub(crate) struct Hints {
    _oom: Pin<KBox<OomNotifier<Task<Hinting>>>>,
    _shrinker: Shrinker<Task<Hinting>>,
    task: Arc<Task<Hinting>>,
}

impl Hints {
    /// Sets the feature up, if it was negotiated.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what [`virtio::Device::config`] says.
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

    fn queue_used(&self, queue: Queue) {
        if queue == Queue::Hint {
            self.task.schedule();
        }
    }

    /// The device may have a new id.
    fn config_changed(&self) {
        self.task.id_changed.store(true, Release);
        self.task.schedule();
    }

    fn quiesce(&self, why: Quiesce) -> Result {
        let task = &self.task;

        task.stop();
        match (&task.taker, why) {
            (Some(taker), Quiesce::Shutdown) => taker.stop(),
            (None, Quiesce::Shutdown) => (),
            (taker, Quiesce::Reset) => {
                task.worker.lock().free_pending();
                task.release();
                taker.iter().for_each(|taker| taker.leave());
            }
        }
        Ok(())
    }

    fn reclaim(&self) {
        let mut worker = self.task.worker.lock();

        worker.in_flight = 0;
        drop(worker.queue.take_back());
    }

    fn restore(&self, dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        let task = &self.task;
        let Some(queue) = queues.take(Queue::Hint)? else {
            return Ok(());
        };

        *task.worker.lock() = Worker::new(dev, queue, task.taker.clone())?;
        task.taker.iter().for_each(|taker| taker.enter());
        task.resume();
        Ok(())
    }
}

impl Job for Hinting {
    fn run(task: &Task<Self>) {
        let mut worker = task.worker.lock();

        match task.advance(&mut worker) {
            Ok(Some(delay)) => task.schedule_in(delay),
            Ok(None) => (),
            // If the device is gone, so is the host that wanted to know; and nobody hears more of a
            // broken queue.
            Err(_) => task.give_up(&mut worker),
        }
    }
}

impl Shrink for Task<Hinting> {
    fn count(&self) -> usize {
        self.held.lock().pages()
    }

    fn scan(&self, wanted: usize) -> usize {
        self.needed.store(true, Relaxed);
        self.held.lock().free(wanted)
    }
}

impl OomNotify for Task<Hinting> {
    /// Before the balloon, which then need not give anything.
    const PRIORITY: c_int = oom::PRIORITY + 1;

    /// Waits for what the device has, which it uses soon. What it had used before was given back by
    /// the shrinker.
    fn out_of_memory(&self) -> usize {
        self.needed.store(true, Relaxed);
        let before = memory::free_pages();

        within(timeouts::OOM_HINTS, || {
            // The task may be allocating itself, in the transport.
            let mut worker = self.worker.try_lock()?;
            let freed = self.collect(&mut worker) + worker.free_pending() + self.release();

            if freed == 0 && worker.in_flight == 0 {
                // The task may have been faster. Nobody is to be killed for memory that is there by
                // now.
                let freed = memory::free_pages().saturating_sub(before);

                return Some(if freed >= WORTHWHILE { freed } else { 0 });
            }
            (freed > 0).then_some(freed)
        })
        .unwrap_or(0)
    }
}
