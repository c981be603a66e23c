// SPDX-License-Identifier: GPL-2.0

//! Memory for the host without zeroing.
//!
//! A kernel with `init_on_alloc=1` zeroes all memory that it allocates. The host then has to
//! provide that memory, although it inflates because it is short of memory. Free or nearly free
//! memory blocks avoid that ([`MemoryBlock::take`]): a task takes one after the other, for the
//! balloon, hints or host requests, which adopt the pages.
//!
//! The task holds none of their locks. The kernel calls the notifiers of memory offlining under its
//! lock for hotplug, and the notifiers take those locks.

#![forbid(unsafe_code)]

use crate::{
    device::{
        settings::Settings,
        timeouts, //
    },
    rust::{
        mm::{
            hotplug::memory_block::{
                has_virtio_mem,
                Limits,
                MemoryBlock,
                Outcome, //
            },
            memory,
            node::Node,
            pages::{
                batch::Batch,
                page_list::PageList, //
            }, //
        },
        virtio,
        work::{
            poll::poll_timeout,
            task::{
                Job,
                Slot,
                Task,
                TaskQueue,
                Waker, //
            }, //
        }, //
    },
    sources::{
        attempts::Attempts,
        candidates::Candidates,
        nodes,
        offline_blocks::OfflineBlocks,
        source::Source, //
    }, //
};

use core::mem;
use kernel::{
    device::Core,
    new_mutex,
    new_spinlock,
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
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// How many times one run takes a zone's lock to search for blocks.
const HOLDS_PER_RUN: usize = 64;

/// The least needed part of a block, as a divisor. The rest is freed.
const WORTHWHILE: u64 = 8;

/// How long the kernel may try.
const LIMITS: Limits = Limits {
    offline: timeouts::OFFLINE,
    online: timeouts::ONLINE,
    busy: timeouts::HOTPLUG_BUSY,
};

/// How many times a caller has waited for the end of a task.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static WAITS: Atomic<usize> = Atomic::new(0);

/// How many times a task has found no more blocks, or was to end.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static ENDS: Atomic<usize> = Atomic::new(0);

/// Takes memory blocks for another task.
#[pin_data]
pub(crate) struct Offliner {
    dev: ARef<virtio::Device>,
    settings: Arc<Settings>,
    /// The number of ready pages from which on it waits until some are adopted.
    most_ready: usize,
    /// The page frame number (of a kernel page) from which on blocks are useless.
    end: u64,
    waker: Waker,
    #[pin]
    work: Mutex<Work>,
    #[pin]
    state: SpinLock<State>,
    /// The run time of the task since [`spent`](Self::spent), in nanoseconds.
    spent: Atomic<i64>,
}

/// The state that only the offliner's task uses.
struct Work {
    /// The remaining candidates. `None` before the search.
    candidates: Option<Candidates>,
    attempts: Attempts,
    offline: OfflineBlocks,
}

struct State {
    /// The requested number of kernel pages, those that are ready included.
    wanted: u64,
    /// Whether there may be more pages.
    is_busy: bool,
    /// Whether no more is wanted until the task begins again.
    is_cancelled: bool,
    ready: PageList,
    /// How many of the ready pages a caller of [`Offliner::with_ready`] has, in kernel pages.
    borrowed: usize,
    /// The number of taken blocks, since the device was bound.
    blocks: u64,
}

impl State {
    /// Returns how many kernel pages are ready.
    fn ready_pages(&self) -> usize {
        self.ready.len() + self.borrowed
    }
}

impl Offliner {
    /// Returns a task in `slot` that takes blocks below the page frame number `end` (of a kernel
    /// page) for the task of `waker`. Its workqueue is named after `purpose` and `dev`. None if the
    /// settings exclude that, the page allocator does not zero memory, or the kernel cannot take
    /// memory offline.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        slot: impl FnOnce(&Arc<TaskQueue>) -> Result<Slot<Self>>,
        purpose: &str,
        dev: &virtio::Device<Core<'_>>,
        settings: &Arc<Settings>,
        most_ready: usize,
        end: u64,
        waker: Waker,
    ) -> Result<Option<Arc<Task<Self>>>> {
        let is_needed = settings.memory_blocks() && memory::is_zeroed_on_allocation();
        if !is_needed || MemoryBlock::pages() == 0 {
            return Ok(None);
        }

        let work = Work {
            candidates: None,
            attempts: Attempts::default(),
            offline: OfflineBlocks::new()?,
        };
        let state = State {
            wanted: 0,
            is_busy: false,
            is_cancelled: false,
            ready: PageList::new(),
            borrowed: 0,
            blocks: 0,
        };
        let offliner = try_pin_init!(Self {
            dev: (&**dev).into(),
            settings: settings.clone(),
            most_ready,
            end,
            waker,
            work <- new_mutex!(work, "Offliner::work"),
            state <- new_spinlock!(state, "Offliner::state"),
            spent: Atomic::new(0),
        });

        // Not on the queue of the tasks that free memory: its rescuer thread must not wait for page
        // migration, and the kernel warns if it flushes other works.
        let tasks = TaskQueue::without_rescuer(purpose, dev.as_ref())?;

        Ok(Some(Arc::pin_init(
            Task::new(slot(&tasks)?, offliner),
            GFP_KERNEL,
        )?))
    }

    /// Returns how many missing kernel pages justify another block.
    pub(crate) fn is_worthwhile(wanted: usize) -> bool {
        wanted as u64 >= MemoryBlock::pages() / WORTHWHILE
    }

    /// Sets the requested number of kernel pages, those that are ready included. Has no effect
    /// after [`cancel`](Task::cancel).
    pub(crate) fn want(&self, wanted: usize) {
        let mut state = self.state.lock();

        if !state.is_cancelled {
            state.wanted = wanted as u64;
        }
    }

    /// Returns whether more may be [ready](Self::ready) soon.
    pub(crate) fn is_busy(&self) -> bool {
        self.state.lock().is_busy
    }

    /// Returns whether the task was cancelled, and has not begun again.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.state.lock().is_cancelled
    }

    /// Returns how many kernel pages can be [adopted](Self::take_over) now.
    pub(crate) fn ready(&self) -> usize {
        self.state.lock().ready_pages()
    }

    /// Returns the run time of the task since the previous call, in nanoseconds.
    pub(crate) fn spent(&self) -> i64 {
        self.spent.xchg(0, Relaxed)
    }

    /// Returns how many blocks were taken so far.
    pub(crate) fn blocks(&self) -> u64 {
        self.state.lock().blocks
    }

    /// Returns up to `max` kernel pages of the taken blocks.
    pub(crate) fn take_over(&self, max: usize) -> PageList {
        self.with_ready(|ready| {
            let rest = ready.split_off(max);

            mem::replace(ready, rest)
        })
    }

    /// Calls `take` with the pages that are ready, to take some of them. It may take time for each
    /// page, so it runs without the lock.
    fn with_ready<R>(&self, take: impl FnOnce(&mut PageList) -> R) -> R {
        let mut state = self.state.lock();
        let mut ready = mem::replace(&mut state.ready, PageList::new());
        let before = ready.len();
        state.borrowed = before;
        drop(state);

        let result = take(&mut ready);
        let taken = before - ready.len();

        let mut state = self.state.lock();
        state.borrowed = 0;
        state.wanted = state.wanted.saturating_sub(taken as u64);
        if !state.is_cancelled {
            // The others may be newer.
            mem::swap(&mut state.ready, &mut ready);
            state
                .ready
                .append(mem::replace(&mut ready, PageList::new()));
        }
        // If the task was cancelled meanwhile, the rest is freed without the lock.
        drop(state);
        result
    }

    /// Ends the work of the task.
    fn end(&self, work: &mut Work) {
        while let Some(outcome) = work.offline.take_first() {
            self.note(work, outcome);
        }
        work.candidates = None;
        work.attempts = Attempts::default();
        self.state.lock().is_busy = false;
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        ENDS.add(1, Relaxed);
        self.waker.schedule();
    }

    /// Returns whether another block is needed, in addition to `taken` pages.
    fn is_more_wanted(&self, taken: u64) -> bool {
        let state = self.state.lock();
        let ready = state.ready_pages() as u64 + taken;
        let missing = state.wanted.saturating_sub(ready);
        missing > 0 && Self::is_worthwhile(missing as usize)
    }

    /// Returns the next block to try, none during the search.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there are no more, `ENOMEM`.
    fn next(&self, work: &mut Work) -> Result<Option<MemoryBlock>> {
        // Only one driver can set the callback. A virtio-mem device may be plugged at any time, and
        // the probe of its driver fails while this driver has set the callback.
        if has_virtio_mem(&self.dev) || work.offline.has_failed_too_often() {
            return Err(ENOENT);
        }
        let candidates = match &mut work.candidates {
            Some(candidates) => candidates,
            none => none.insert(Candidates::new(self.end)?),
        };

        match candidates.search(HOLDS_PER_RUN)? {
            true => Ok(None),
            false => candidates
                .pop(|node| self.precedence(node))
                .map(Some)
                .ok_or(ENOENT),
        }
    }

    /// Returns the precedence of `node`, none if it cannot spare a block.
    fn precedence(&self, node: Node) -> Option<usize> {
        let floor = self.settings.floor_pages();
        let is_spare = nodes::room(node, floor) as u64 >= MemoryBlock::pages();

        is_spare.then(|| nodes::precedence(node, floor))
    }

    /// Returns whether the guest can do without `pages` kernel pages.
    fn can_spare(&self, pages: u64) -> bool {
        let floor = self.settings.floor_pages() as u64;

        memory::available_pages() as u64 >= floor.saturating_add(pages)
    }

    /// Takes one block, if one is needed and there is a candidate. Returns whether to continue.
    fn take_one(&self, work: &mut Work) -> bool {
        let taken = work.offline.first_pages();
        if !self.is_more_wanted(taken) || !self.can_spare(MemoryBlock::pages()) {
            return false;
        }
        let block = match self.next(work) {
            Ok(Some(block)) if block.can_be_taken() => block,
            Ok(_) => return true,
            Err(_) => return false,
        };

        let is_wanted = || self.is_more_wanted(taken);
        let outcome = match work.offline.add_first(block, LIMITS, is_wanted) {
            Some(Ok(())) => return true,
            Some(Err(error)) => Outcome::Not(error),
            None => block.take(LIMITS, is_wanted),
        };
        self.note(work, outcome)
    }

    /// Notes the outcome of taking a block. Returns whether to continue.
    fn note(&self, work: &mut Work, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Pages(pages) => {
                work.attempts.succeed();
                // Other callers may have allocated memory in the meantime. They have priority.
                if !self.can_spare(0) {
                    return false;
                }
                let mut state = self.state.lock();
                // Unwanted pages are freed without the lock.
                if state.wanted > 0 {
                    state.ready.append(pages);
                    state.blocks += 1;
                }
                drop(state);
                self.waker.schedule();
                true
            }
            Outcome::Not(error) => work.attempts.fail(error),
            Outcome::Offline(block) => {
                work.offline.fail(block);
                false
            }
        }
    }
}

impl Task<Offliner> {
    /// Begins to take blocks until `wanted` kernel pages are ready, or until there are no more.
    pub(crate) fn begin(&self, wanted: usize) {
        let mut state = self.state.lock();

        state.wanted = wanted as u64;
        state.is_busy = true;
        state.is_cancelled = false;
        drop(state);
        self.schedule();
    }

    /// Returns the first pages that were taken and are adjacent, with the page frame number of the
    /// first one (of a kernel page).
    pub(crate) fn take_adjacent(&self) -> Option<(u64, PageList)> {
        let pages = self.with_ready(PageList::take_adjacent);

        self.schedule();
        pages
    }

    /// Requests no more, and frees the pages that are ready. Returns their number in kernel pages.
    pub(crate) fn cancel(&self) -> usize {
        let mut state = self.state.lock();

        state.wanted = 0;
        state.is_cancelled = true;
        // Freed without the lock.
        let ready = mem::replace(&mut state.ready, PageList::new());
        let is_busy = state.is_busy;
        drop(state);

        if is_busy {
            self.schedule();
        }
        ready.len()
    }

    /// Waits until the task has ended after [`cancel`](Self::cancel): the block that it took is
    /// free again, or was not taken. Returns whether that is so.
    pub(crate) fn ends_within(&self, timeout: Delta) -> bool {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        WAITS.add(1, Relaxed);
        poll_timeout(timeout, || (!self.is_busy()).then_some(())).is_some()
    }

    /// Continues after [`quiesce`](Self::quiesce). Some blocks may be offline that could not be
    /// brought online during hibernation.
    pub(crate) fn restore(&self) {
        self.resume();
        self.schedule();
    }

    /// Ends all work, and frees the taken blocks.
    pub(crate) fn quiesce(&self) {
        self.stop();
        self.cancel();

        let mut work = self.work.lock();
        self.end(&mut work);
        work.offline.bring_online();
    }
}

impl Job for Offliner {
    fn run(task: &Task<Self>) {
        let mut work = task.work.lock();

        if task.is_busy() && task.ready() < task.most_ready {
            let start = Instant::<Monotonic>::now();
            let is_more = task.take_one(&mut work);

            task.spent.add(start.elapsed().as_nanos(), Relaxed);
            match is_more {
                true => return task.schedule(),
                false => task.end(&mut work),
            }
        }
        if !work.offline.bring_online() {
            task.schedule_in(timeouts::ONLINE_AGAIN);
        }
    }
}

impl Source for &Offliner {
    fn gather(&mut self, batch: &mut Batch, wanted: usize, _blocks: usize, unsplit: bool) {
        let mut pages = self.take_over(wanted);

        if !unsplit {
            pages.split_blocks();
        }
        // Blocks without room are freed.
        batch.add(&mut pages);
    }
}
