// SPDX-License-Identifier: GPL-2.0

use super::device::eventually;
use crate::{
    device::timeouts,
    rust::{
        mm::{
            balloon::{
                balloon_pages::BalloonPages,
                node_pages::ByOrder,
                replace::{
                    MigratePage,
                    OldBlock,
                    OldPage, //
                }, //
            },
            contig::{
                contig_pages::ContigPages,
                drain, //
            },
            memory,
            node::NodeSet,
            pages::{
                batch::Batch,
                block_range::BlockRange, //
                page::MAX_ORDER,
                page_list::PageList,
            },
            pfn_range::PfnRange, //
        },
        this_module, //
    }, //
};

use core::hint::spin_loop;
use kernel::{
    cpu,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    workqueue, //
};

/// Allocates a list of 2^`order` adjacent order-0 pages.
pub(super) fn block(order: u32) -> Result<PageList> {
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    batch.alloc(order, 1, false).map_err(|_| ENOMEM)?;
    Ok(batch.take_all())
}

/// Collects `n` of the largest blocks, `unsplit` or as order-0 pages.
fn gather(n: usize, unsplit: bool) -> Result<Batch> {
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    for _ in 0..n {
        batch.alloc(MAX_ORDER, 1, unsplit).map_err(|_| ENOMEM)?;
    }
    Ok(batch)
}

/// Allocates a list of `n` of the largest blocks.
fn blocks(n: usize) -> Result<PageList> {
    Ok(gather(n, true)?.take_all())
}

/// Allocates the pages of a block in place.
fn contiguous() -> Result<ContigPages> {
    let mut pages = None;

    // Other tasks may allocate some of it in the meantime, but not each time.
    eventually(|| {
        let block = block(MAX_ORDER)?;
        let first = block.pfns().next().ok_or(EINVAL)?;

        drop(block);
        drain::drain_free_lists();
        pages = PfnRange::new(first, 1 << MAX_ORDER).and_then(|pfns| ContigPages::new(pfns).ok());
        Ok(pages.is_some())
    })?;
    pages.ok_or(ENOMEM)
}

/// No page is migrated in these tests.
struct Fixed;

impl MigratePage for Fixed {
    const END_TIMEOUT: Delta = timeouts::MIGRATION_AT_END;

    fn replace(&self, _old: &OldPage<'_>, _new: u64, _may_sleep: bool) -> Result {
        Err(EAGAIN)
    }
}

/// Blocks leave at once.
struct Vacated;

impl MigratePage for Vacated {
    const END_TIMEOUT: Delta = timeouts::MIGRATION_AT_END;

    fn replace(&self, _old: &OldPage<'_>, _new: u64, _may_sleep: bool) -> Result {
        Err(EAGAIN)
    }

    fn vacate(&self, block: &mut OldBlock<'_>) {
        // The second attempt gets nothing.
        drop((block.take(), block.take()));
    }
}

fn balloon() -> Result<BalloonPages<Fixed>> {
    BalloonPages::new(true, Ok(Fixed))
}

/// A slow page migration.
struct Slow {
    begun: Atomic<bool>,
    may_end: Atomic<bool>,
    /// Set when the first page was refused.
    ended: Atomic<bool>,
}

impl MigratePage for Arc<Slow> {
    const END_TIMEOUT: Delta = timeouts::MIGRATION_AT_END;

    fn replace(&self, _old: &OldPage<'_>, _new: u64, may_sleep: bool) -> Result {
        if may_sleep {
            self.begun.store(true, Release);
            for _ in 0..1_000 {
                if self.may_end.load(Acquire) {
                    break;
                }
                fsleep(Delta::from_millis(10));
            }
            self.ended.store(true, Release);
            // A failed test ends as well.
            self.may_end.store(true, Release);
        }
        Err(EAGAIN)
    }
}

/// Drops a balloon of order-0 pages while the kernel migrates some of them. Returns whether the
/// drop ends before the migration.
fn drop_while_migrating() -> Result<bool> {
    let slow = Slow {
        begun: Atomic::new(false),
        may_end: Atomic::new(false),
        ended: Atomic::new(false),
    };
    let slow = Arc::new(slow, GFP_KERNEL)?;
    let balloon = BalloonPages::new(true, Ok(slow.clone()))?;
    let pages = block(MAX_ORDER)?;
    let first = pages.pfns().next().ok_or(EINVAL)? as usize;
    let references = this_module::references();

    balloon.insert(pages);
    workqueue::system_unbound().try_spawn(GFP_KERNEL, move || {
        drop(PageList::alloc_range(first, 1 << MAX_ORDER));
    })?;
    eventually(|| Ok(slow.begun.load(Acquire)))?;
    drop(balloon);

    let is_over = !slow.ended.load(Acquire);
    let is_thread_there = this_module::references() > references || cfg!(not(MODULE));
    slow.may_end.store(true, Release);
    eventually(|| Ok(this_module::references() == references))?;
    Ok(is_over && is_thread_there)
}

/// A balloon that gets pages while another thread takes some.
struct Contended {
    balloon: Arc<BalloonPages<Fixed>>,
    /// Set when the other thread has begun, when all pages are in, and when the other thread has
    /// ended.
    begun: Atomic<bool>,
    inserted: Atomic<bool>,
    over: Atomic<bool>,
    /// Whether a page was taken before all were in.
    between: Atomic<bool>,
}

impl Contended {
    /// Takes one page after the other, until all are in: then balloons have `len` pages more than
    /// `before`.
    fn take(&self, before: usize, len: usize) {
        /// The largest deviation of the per-CPU counters, in pages.
        const NOT_COUNTED: usize = 512;
        let mut taken = 0;

        self.begun.store(true, Release);
        while !self.inserted.load(Acquire) {
            let some = self.balloon.take(1, 1, &NodeSet::all()).len();

            taken += some;
            if some > 0 && memory::ballooned_pages() + taken + NOT_COUNTED < before + len {
                self.between.store(true, Release);
            }
        }
        self.over.store(true, Release);
    }
}

/// Puts many order-0 pages into a balloon. Returns whether another thread gets some before all are
/// in.
fn others_get_pages_meanwhile() -> Result<bool> {
    const PAGES: usize = 1 << 14;
    let pages = gather(PAGES >> MAX_ORDER, false)?.take_all();
    let contended = Contended {
        balloon: Arc::new(BalloonPages::new(false, Ok(Fixed))?, GFP_KERNEL)?,
        begun: Atomic::new(false),
        inserted: Atomic::new(false),
        over: Atomic::new(false),
        between: Atomic::new(false),
    };
    let this = Arc::new(contended, GFP_KERNEL)?;
    let other = this.clone();
    let (before, len) = (memory::ballooned_pages(), pages.len());

    workqueue::system_unbound().try_spawn(GFP_KERNEL, move || other.take(before, len))?;
    // Do not sleep: the other thread must run on another processor.
    let spawned = Instant::<Monotonic>::now();
    while !this.begun.load(Acquire) && spawned.elapsed() < Delta::from_millis(10) {
        spin_loop();
    }
    this.balloon.insert(pages);
    this.inserted.store(true, Release);
    eventually(|| Ok(this.over.load(Acquire)))?;

    Ok(this.between.load(Acquire))
}

/// Returns the pages of a balloon with so many order-0 pages and largest blocks.
fn held(base_pages: usize, blocks: usize) -> ByOrder {
    let mut by_order = [0; MAX_ORDER as usize + 1];

    by_order[0] = base_pages;
    by_order[MAX_ORDER as usize] = blocks;
    by_order
}

/// Returns whether the page frame numbers of `pages` are consecutive.
fn consecutive(pages: &PageList) -> bool {
    pages
        .pfns()
        .zip(pages.pfns().skip(1))
        .all(|(this, next)| this + 1 == next)
}

#[kunit_tests(virtio_balloon_rs_pages)]
mod tests {
    use super::*;

    #[test]
    fn no_range_is_allocated_where_there_is_no_memory() {
        for (first, len) in [
            (usize::MAX - 1, 1),
            (usize::MAX - 1, 4),
            (usize::MAX >> kernel::page::PAGE_SHIFT, 1),
            (0, 0),
        ] {
            let pages = PageList::alloc_range(first, len);
            assert!(pages.is_err_and(|error| error == EINVAL));
        }
    }

    #[test]
    fn a_block_becomes_pages_in_order() {
        for order in [0, 1, 5, 9, MAX_ORDER] {
            let pages = block(order);
            assert!(pages.is_ok());

            let pages = pages.unwrap_or(PageList::new());
            assert_eq!(pages.len(), 1 << order);
            assert_eq!(pages.pfns().count(), 1 << order);
            assert!(consecutive(&pages));
        }
    }

    #[test]
    fn an_impossible_order_fails() {
        assert!(block(MAX_ORDER + 1).is_err());
    }

    #[test]
    fn a_list_can_be_moved() {
        let pages = block(4).unwrap_or(PageList::new());
        let first = pages.pfns().next();
        let moved = KBox::new(pages, GFP_KERNEL);

        assert!(moved.is_ok_and(|moved| moved.pfns().next() == first && moved.len() == 16));
    }

    #[test]
    fn inflating_is_accounted_for_page_by_page() {
        let balloon = balloon();
        assert!(balloon.is_ok());
        let Ok(balloon) = balloon else { return };
        let pages = block(6).unwrap_or(PageList::new());
        let (total, ballooned) = (memory::total_pages(), memory::ballooned_pages());

        balloon.insert(pages);
        assert_eq!(balloon.len(), 64);
        assert_eq!(memory::total_pages(), total - 64);
        assert_eq!(memory::ballooned_pages(), ballooned + 64);

        let some = balloon.take(10, usize::MAX, &NodeSet::all());
        assert_eq!(some.len(), 10);
        assert_eq!(balloon.len(), 54);
        assert_eq!(memory::total_pages(), total - 54);
        assert_eq!(memory::ballooned_pages(), ballooned + 54);

        // Pages of one block come out in ascending order, so that they are freed as a block.
        assert!(consecutive(&some));

        // More pages than it has.
        assert_eq!(balloon.take(1_000, usize::MAX, &NodeSet::all()).len(), 54);
        assert!(balloon.take(1, usize::MAX, &NodeSet::all()).is_empty());
        assert_eq!(memory::total_pages(), total);
        assert_eq!(memory::ballooned_pages(), ballooned);
    }

    #[test]
    fn other_callers_get_pages_while_many_are_added() {
        // With one processor there is no other thread. With more, it may not be running at the
        // moment.
        assert!(cpu::nr_cpu_ids() == 1 || eventually(others_get_pages_meanwhile).is_ok());
    }

    #[test]
    fn blocks_are_accounted_for_like_single_pages() {
        const LEN: usize = 1 << MAX_ORDER;

        let balloon = balloon();
        assert!(balloon.is_ok());
        let Ok(balloon) = balloon else { return };
        let pages = blocks(3);
        assert!(pages.is_ok());
        let Ok(pages) = pages else { return };
        let (total, ballooned) = (memory::total_pages(), memory::ballooned_pages());

        balloon.insert(pages);
        assert_eq!(balloon.len(), 3 * LEN);
        assert_eq!(memory::total_pages(), total - 3 * LEN);
        assert_eq!(memory::ballooned_pages(), ballooned + 3 * LEN);
        assert!(balloon.by_order() == held(0, 3));

        // A block stays unsplit if it fits, and is split if there are no other pages.
        assert_eq!(
            balloon.take(2 * LEN - 1, usize::MAX, &NodeSet::all()).len(),
            LEN
        );
        assert_eq!(balloon.take(LEN, 1, &NodeSet::all()).len(), LEN);
        assert_eq!(balloon.take(100, 10, &NodeSet::all()).len(), 10);
        assert_eq!(balloon.len(), LEN - 10);
        assert_eq!(memory::total_pages(), total - LEN + 10);
        assert_eq!(memory::ballooned_pages(), ballooned + LEN - 10);
        assert!(balloon.by_order() == held(LEN - 10, 0));
    }

    #[test]
    fn a_list_is_split_at_any_page() {
        const LEN: usize = 1 << MAX_ORDER;

        for len in [0, 1, LEN - 1, LEN, LEN + 3, 3 * LEN, 3 * LEN + 1] {
            let pages = blocks(3);
            assert!(pages.is_ok());
            let Ok(mut pages) = pages else { return };
            let mut rest = pages.split_off(len);

            assert_eq!(pages.len(), len.min(3 * LEN));
            assert_eq!(rest.len(), 3 * LEN - pages.len());
            rest.append(pages);
            assert_eq!(rest.len(), 3 * LEN);
        }
    }

    #[cfg(all(CONFIG_CONTIG_ALLOC, CONFIG_BALLOON_MIGRATION))]
    #[test]
    fn a_block_leaves_when_its_memory_is_needed() -> Result {
        const LEN: usize = 1 << MAX_ORDER;
        let (fixed, balloon) = (balloon()?, BalloonPages::new(true, Ok(Vacated))?);
        let (total, ballooned) = (memory::total_pages(), memory::ballooned_pages());
        let first = |batch: &mut Batch| batch.first().ok_or(ENOENT);
        let alloc = |pfns: PfnRange| PageList::alloc_range(pfns.first() as usize, LEN);

        let mut batch = gather(2, true)?;
        let (pfns, mut some) = (first(&mut batch)?, PageList::new());
        batch.take_first(&mut some);
        balloon.insert(some);
        let other = first(&mut batch)?;
        fixed.insert(batch.take_all());

        // Nothing else may be in the way, but the kernel may look at a page for a moment.
        let mut taken = None;
        eventually(|| {
            taken = alloc(pfns).ok();
            Ok(taken.is_some())
        })?;
        assert!(alloc(other).is_err());
        assert_eq!(balloon.len(), 0);
        assert!(balloon.by_order() == held(0, 0));
        assert!(fixed.by_order() == held(0, 1));
        assert_eq!(memory::ballooned_pages(), ballooned + LEN);
        assert_eq!(memory::total_pages(), total - LEN);

        drop((taken, fixed));
        assert_eq!(memory::ballooned_pages(), ballooned);
        assert_eq!(memory::total_pages(), total);
        Ok(())
    }

    #[test]
    fn nothing_is_taken_for_nodes_with_enough_memory() -> Result {
        let balloon = balloon()?;

        balloon.insert(blocks(1)?);
        assert_eq!(balloon.len_on(&NodeSet::short()), 0);
        assert!(balloon
            .take(usize::MAX, usize::MAX, &NodeSet::short())
            .is_empty());
        assert_eq!(balloon.len(), 1 << MAX_ORDER);
        Ok(())
    }

    #[test]
    fn a_page_with_a_memory_error_is_kept_aside() -> Result {
        for place in [0, 1, (1 << MAX_ORDER) - 1] {
            let block = blocks(1)?;
            assert_ne!(block.free_with_error(place), Some(false));

            let range = BlockRange::alloc(None, MAX_ORDER).ok_or(ENOMEM)?;
            assert_ne!(range.free_with_error(place), Some(false));

            assert_ne!(contiguous()?.free_with_error(place), Some(false));
        }

        // BasePage pages that are freed together.
        assert_ne!(block(MAX_ORDER)?.free_with_error(0), Some(false));
        Ok(())
    }

    #[test]
    fn a_balloon_that_is_dropped_does_not_wait_for_page_migration() -> Result {
        let ballooned = memory::ballooned_pages();

        assert_eq!(drop_while_migrating(), Ok(true));
        eventually(|| Ok(memory::ballooned_pages() == ballooned))
    }

    #[test]
    fn a_balloon_that_is_dropped_gives_everything_back() {
        let (total, ballooned) = (memory::total_pages(), memory::ballooned_pages());

        {
            let balloon = balloon();
            assert!(balloon.is_ok());
            let Ok(balloon) = balloon else { return };

            balloon.insert(block(MAX_ORDER).unwrap_or(PageList::new()));
            balloon.insert(blocks(1).unwrap_or(PageList::new()));
            assert_eq!(memory::ballooned_pages(), ballooned + (2 << MAX_ORDER));
        }

        assert_eq!(memory::total_pages(), total);
        assert_eq!(memory::ballooned_pages(), ballooned);
    }
}
