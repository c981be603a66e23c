// SPDX-License-Identifier: GPL-2.0

//! Free page hinting: a host that migrates the guest omits free memory.
//!
//! The host publishes an id. The driver answers with the id, allocates free memory, passes it to
//! the device, and ends the round with the id [`HINT_STOP`]. It holds the memory until the host
//! publishes [`HINT_DONE`], since the host would have to migrate memory that is written in between.
//!
//! The driver does not free memory that the device has not used yet. A host that skips it clears
//! its dirty bits. If the dirty log was initially set (all pages dirty, none of them
//! write-protected), the host sees only writes after that moment, and an earlier write would be
//! lost on the destination. A host that discards the memory would discard the data of its new
//! owner. Memory that the device has used can be freed when the guest needs it.
//!
//! For each buffer QEMU takes a lock that its migration holds for up to 50 ms at a time. So the
//! driver first collects the memory, merges adjacent blocks into one buffer, and sends the largest
//! buffers first.
//!
//! A kernel with `init_on_alloc=1` zeroes all memory that it allocates, which the host then has to
//! provide and to migrate. So the driver hints memory blocks there, which the kernel does not zero
//! ([`memory_blocks`](crate::sources::memory_blocks)), unless the administrator forbids that.
//!
//! Lock order: [`Hinting::worker`], then [`Hinting::held`]. Memory is allocated under the first
//! one, but without reclaim. No memory is allocated under the second one, since reclaim takes that
//! lock.
//!
//! Specification: clause 5.5.6.5, Free Page Hinting.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::Setup,
        settings::Settings,
        timeouts, //
    },
    features::hinting::worker::{
        HintQueue,
        Worker,
        RANGES_PER_ENTRY, //
    },
    rust::{
        fs::debugfs,
        mm::{
            contig::drain,
            pages::block_range::BlockRangeSet, //
        },
        virtio::{
            ByteOrder,
            Either, //
        },
        virtio_balloon::{
            HINT_DONE,
            HINT_ID,
            HINT_STOP, //
        },
        work::{
            poll::StallTimeout,
            task::{
                new_slot,
                Job,
                Task, //
            }, //
        }, //
    },
    sources::memory_blocks::Offliner, //
};

use kernel::{
    new_mutex,
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::Msecs, //
};

/// Free page hinting of a device.
#[pin_data]
pub(super) struct Hinting {
    pub(super) byte_order: ByteOrder,
    pub(super) settings: Arc<Settings>,
    /// Takes memory blocks, if the kernel zeroes the memory that it allocates.
    pub(super) offliner: Option<Arc<Task<Offliner>>>,
    #[pin]
    pub(super) worker: Mutex<Worker>,
    /// Memory that the device has used, and that is held until the guest needs it.
    #[pin]
    pub(super) held: SpinLock<BlockRangeSet>,
    /// Set when the device has changed its configuration space since the id was last read.
    pub(super) id_changed: Atomic<bool>,
    /// Set when the guest needed memory: this round allocates no more.
    pub(super) needed: Atomic<bool>,
    /// How long OOM notifiers wait for the device to use hints.
    pub(super) oom_timeout: StallTimeout,
    /// The hinted memory in bytes.
    #[pin]
    pub(super) hinted: debugfs::File<Atomic<u64>>,
}

impl Hinting {
    /// Sets up the feature for `queue`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or the error of [`virtio::Device::config`].
    pub(super) fn new(setup: &Setup<'_, '_>, queue: HintQueue) -> Result<Arc<Task<Self>>> {
        let slot = new_slot!(c"virtio_balloon_rs_hint", setup.tasks)?;
        let held = BlockRangeSet::new(queue.size() * RANGES_PER_ENTRY)?;
        let offliner = Offliner::new(
            |tasks| new_slot!(c"virtio_balloon_rs_hint_blocks", tasks),
            "hints",
            setup.dev,
            &setup.settings,
            usize::MAX,
            u64::MAX,
            slot.waker(),
        )?;
        let worker = Worker::new(setup.dev, queue, offliner.clone())?;
        let hinting = try_pin_init!(Self {
            byte_order: setup.dev.byte_order(),
            settings: setup.settings.clone(),
            offliner,
            worker <- new_mutex!(worker, "Hinting::worker"),
            held <- new_spinlock!(held, "Hinting::held"),
            id_changed: Atomic::new(true),
            needed: Atomic::new(false),
            oom_timeout: StallTimeout::new(timeouts::OOM_HINTS),
            hinted <- setup.dir.file(c"hinted_bytes", Atomic::new(0)),
        });

        Arc::pin_init(Task::new(slot, hinting), GFP_KERNEL)
    }

    /// Frees held memory: blocks of `wanted` kernel pages or more, or all. Returns how many pages.
    pub(super) fn release(&self, wanted: usize) -> usize {
        let mut released = 0;

        while released < wanted {
            // The lock is released before the block is freed, since the kernel may zero it.
            let Some(block) = self.held.lock().pop_block() else {
                break;
            };
            released += block.len();
        }
        released
    }

    /// Gives up: frees the memory that was not passed to the device.
    fn give_up(&self, worker: &mut Worker) {
        worker.stop();
        worker.keeping = false;
        self.release(usize::MAX);
    }

    /// Takes the used buffers. Returns how many of their kernel pages were freed.
    pub(super) fn collect(&self, worker: &mut Worker) -> usize {
        let mut freed = 0;

        while let Some((buffer, _)) = worker.queue.next_used() {
            self.oom_timeout.progress();
            let Either::Right(range) = buffer else {
                continue;
            };

            let pages = range.len();
            worker.in_flight -= pages;
            self.hinted.add((pages as u64) << PAGE_SHIFT, Relaxed);
            if worker.keeping {
                // Without room for it, the memory is freed, which is allowed now. The round ends,
                // so that the driver does not hint the same memory repeatedly.
                let unheld = self.held.lock().insert(range);
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

    /// Reads the id if the device has changed its configuration space, and not more often.
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

    /// Follows the host's command.
    fn follow(&self, worker: &mut Worker) -> Result {
        self.read_id(worker)?;
        let wanted = worker.wanted;

        if wanted == HINT_STOP || wanted == HINT_DONE {
            worker.stop();
            if wanted == HINT_DONE {
                worker.keeping = false;
                self.release(usize::MAX);
            }
        } else if wanted != worker.id {
            worker.stop();
            worker.id = wanted;
            worker.start_due = true;
            worker.supplying = true;
            worker.keeping = true;
            worker.more = true;
            self.needed.store(false, Relaxed);

            // The driver hints earlier hints again, as far as they are above the reserve: they may
            // have been written before the host started its dirty log, and the host may know that
            // by now.
            self.release(usize::MAX);
            drain::drain_long_lists();
            worker.begin_blocks(self.settings.floor_pages());
        } else if self.needed.load(Relaxed) {
            worker.stop();
        }

        Ok(())
    }

    /// Does the work that is possible now. Returns after how many milliseconds to run again without
    /// an event.
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

        // An OOM notifier that waits for the lock would get no memory from an idle round.
        let is_idle = worker.in_flight == 0 && worker.pending.pages() == 0;
        if worker.supplying && worker.awaits_blocks() {
            worker.take_blocks();
        } else if worker.supplying && worker.more && is_idle {
            worker.gather(self.settings.floor_pages(), &self.needed);
        }

        let mut sent = worker.stop_due || worker.start_due;
        if worker.send_ids(self.byte_order) && worker.supplying {
            sent |= worker.supply();

            let is_all_used = worker.in_flight == 0 && worker.pending.pages() == 0;
            if is_all_used && !worker.awaits_blocks() {
                worker.stop();
                worker.send_ids(self.byte_order);
                sent = true;
            }
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

impl Job for Hinting {
    fn run(task: &Task<Self>) {
        let mut worker = task.worker.lock();

        match task.advance(&mut worker) {
            Ok(Some(delay)) => task.schedule_in(delay),
            Ok(None) => (),
            // A device that is gone needs no hints, and a broken queue delivers none.
            Err(_) => task.give_up(&mut worker),
        }
    }
}
