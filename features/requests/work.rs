// SPDX-License-Identifier: GPL-2.0

//! The work of a host request.

#![forbid(unsafe_code)]

use crate::{
    free_pages::Walk,
    rust::{
        mm::{
            contig::contig_pages::ContigPages,
            hotplug::memory_block::MemoryBlock,
            memory::{
                self,
                Reservation,
                ReserveGuard, //
            },
            pages::page::pageblock_order,
            pfn_range::PfnRange,
            zone::PFNS_PER_HOLD, //
        },
        right::{
            Right,
            RightGuard, //
        },
        virtio_balloon::{
            request,
            Request, //
        },
        work::{
            task::{
                Task,
                Waker, //
            },
            thread::Thread, //
        }, //
    },
    sources::memory_blocks::Offliner, //
};

use kernel::{
    new_mutex,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// How many kernel pages one message may own, unless a pageblock is larger, and how many such
/// messages may be in flight: 64 MiB, four times.
const RANGE_PAGES: u64 = 1 << (26 - PAGE_SHIFT);
pub(super) const MAX_RANGES: usize = 4;

/// The first of these if the kernel zeroes allocated memory, so that the host needs hardly any more
/// memory meanwhile: 4 MiB.
const ZEROED_RANGE_PAGES: u64 = 1 << (22 - PAGE_SHIFT);

/// The right to allocate a range, which one thread of all devices has at a time. A thread that was
/// killed has it until it ends, so requests that are cancelled repeatedly leave one thread behind.
pub(super) static ALLOCATING: Right = Right::new();

/// How many such threads were started.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static ALLOCATIONS: Atomic<usize> = Atomic::new(0);

/// An open request.
pub(super) struct Open {
    pub(super) id: u64,
    pub(super) work: Work,
}

impl Open {
    /// Returns whether it has a range that is not sent yet.
    pub(super) fn has_allocation(&self) -> bool {
        matches!(&self.work, Work::Discard(discard) if discard.allocation.is_some())
    }

    /// Returns whether the next step starts new work, which a pause delays.
    pub(super) fn is_new_work(&self) -> bool {
        match &self.work {
            Work::Skip(_) | Work::DropCaches(_) => true,
            Work::Discard(_) => !self.has_allocation(),
            Work::CacheDropper(_) | Work::Complete(_) => false,
        }
    }

    /// Returns whether memory blocks should be taken for the request.
    pub(super) fn needs_blocks(&self) -> bool {
        matches!(&self.work, Work::Discard(discard) if discard.blocks.is_some())
    }
}

/// The remaining work of a request.
pub(super) enum Work {
    /// List the blocks of the walk.
    Skip(Walk),
    /// Allocate memory and list it.
    Discard(Discard),
    /// Drop caches, after another request that may be dropping them now.
    DropCaches(Caches),
    /// Caches are being dropped.
    CacheDropper(Thread),
    /// Send the completion with this status.
    Complete(u8),
}

/// The progress of an answer by one message, or by a search for memory.
pub(super) enum AnswerProgress {
    /// There may be more to list.
    More,
    /// The answer ends with this status.
    End(u8),
}

/// The remaining memory of a discard request.
pub(super) struct Discard {
    /// Memory blocks come first, if they are in use.
    pub(super) blocks: Option<Blocks>,
    /// The walk's memory comes next, except for these blocks.
    pub(super) walk: Walk,
    pub(super) listed: KVec<MemoryBlock>,
    /// A range of the walk that is being allocated.
    pub(super) allocation: Option<Allocation>,
}

/// A range of free pages, and the thread that allocates it. The kernel migrates pages that other
/// callers have allocated meanwhile, and may wait for the disk without a limit.
pub(super) struct Allocation {
    /// The number of the range's zone.
    zone: usize,
    range: PfnRange,
    allocated: Arc<Allocated>,
    thread: Thread,
}

/// What the thread has allocated.
#[pin_data]
struct Allocated {
    #[pin]
    pages: Mutex<Option<ContigPages>>,
}

impl Allocation {
    /// Starts the thread, which adds its run time in nanoseconds to `spent`, and then schedules the
    /// task of `waker`. The range is above the reserve.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `ENODEV` if the module is being unloaded.
    pub(super) fn start(
        (zone, range): (usize, PfnRange),
        taking: &ReserveGuard,
        right: RightGuard,
        spent: Arc<Atomic<i64>>,
        waker: Waker,
    ) -> Result<Self> {
        let reservation = Reservation::new(taking, range.len() as usize);
        let allocated = Arc::pin_init(
            pin_init!(Allocated {
                pages <- new_mutex!(None, "Allocated::pages"),
            }),
            GFP_KERNEL,
        )?;
        let result = allocated.clone();
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        ALLOCATIONS.add(1, Relaxed);
        let thread = Thread::start(c"balloon_rs_discard", Some(waker), move || {
            let start = Instant::<Monotonic>::now();

            let outcome = ContigPages::new(range).map(|pages| {
                *result.pages.lock() = Some(pages);
            });
            drop((reservation, right));
            spent.add(start.elapsed().as_nanos(), Relaxed);
            outcome
        })?;

        Ok(Self {
            zone,
            range,
            allocated,
            thread,
        })
    }

    /// Returns the result of the thread, if it has ended: the errors of [`ContigPages::new`].
    pub(super) fn outcome(&self) -> Option<Result> {
        self.thread.outcome()
    }

    /// Returns the allocated pages, which are the first of the range. If these are not all, `walk`
    /// continues after the page that could not be allocated.
    pub(super) fn finish(self, walk: &mut Walk) -> Option<(PfnRange, ContigPages)> {
        let pages = self.allocated.pages.lock().take();
        let (first, len) = (
            self.range.first(),
            pages.as_ref().map_or(0, ContigPages::len),
        );

        if len < self.range.len() {
            walk.resume_at(self.zone, first + len.max(1));
        }
        Some((PfnRange::new(first, len)?, pages?))
    }
}

/// The memory blocks of a request.
pub(super) struct Blocks {
    pub(super) offliner: Arc<Task<Offliner>>,
    pub(super) is_begun: bool,
}

/// The caches to drop.
#[derive(Clone, Copy)]
pub(super) struct Caches {
    pub(super) pages: bool,
    pub(super) slab: bool,
}

impl Work {
    /// Returns the work for `request`. The `offliner` takes memory blocks, if there is one.
    pub(super) fn plan(request: &Request, offliner: Option<&Arc<Task<Offliner>>>) -> Self {
        match u16::from_le(request.command) {
            // If free pages must have a value, a copy must not lack it. And the kernel would write
            // to all discarded pages when they are freed.
            request::UNUSED_SKIP | request::UNUSED_DISCARD
                if memory::free_page_value().is_some() =>
            {
                Work::Complete(request::ABORTED)
            }
            request::UNUSED_SKIP => match walk(request, 0, PFNS_PER_HOLD) {
                Ok(walk) => Work::Skip(walk),
                Err(_) => Work::Complete(request::ABORTED),
            },
            // Not more at a time than one allocation: the walk would have to scan the rest again.
            request::UNUSED_DISCARD => match walk(
                request,
                pageblock_order(),
                (range_pages() >> pageblock_order()) as usize,
            ) {
                Ok(walk) => Work::Discard(Discard {
                    // They may be anywhere.
                    blocks: offliner
                        .filter(|_| request.start == 0 && request.end == 0)
                        .map(|offliner| Blocks {
                            offliner: offliner.clone(),
                            is_begun: false,
                        }),
                    walk,
                    listed: KVec::new(),
                    allocation: None,
                }),
                Err(_) => Work::Complete(request::ABORTED),
            },
            request::DROP_CACHES => {
                let caches = u32::from_le(request.caches);
                let all = request::CACHES_PAGES | request::CACHES_SLAB;

                if caches == 0 || caches & !all != 0 {
                    return Work::Complete(request::MALFORMED);
                }
                Work::DropCaches(Caches {
                    pages: caches & request::CACHES_PAGES != 0,
                    slab: caches & request::CACHES_SLAB != 0,
                })
            }
            _ => Work::Complete(request::UNSUPPORTED),
        }
    }
}

/// Returns how many kernel pages one message may own.
pub(super) fn range_pages() -> u64 {
    let pages = match memory::is_zeroed_on_allocation() {
        true => ZEROED_RANGE_PAGES,
        false => RANGE_PAGES,
    };

    pages.max(1 << pageblock_order())
}

/// Returns the walk for `request`, for blocks of 2^`least` pages at least, `blocks` of them at a
/// time.
fn walk(request: &Request, least: u32, blocks: usize) -> Result<Walk> {
    let order = u32::from(request.block_shift).saturating_sub(PAGE_SHIFT as u32);
    let start = u64::from_le(request.start).div_ceil(PAGE_SIZE as u64);
    let end = match u64::from_le(request.end) {
        0 => PfnRange::ALL.end(),
        end => end >> PAGE_SHIFT,
    };

    Walk::new(PfnRange::between(start, end), order.max(least), blocks)
}
