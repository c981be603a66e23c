// SPDX-License-Identifier: GPL-2.0

//! The walk over unused memory. The tests allocate blocks and free parts of them.

use super::device::eventually;

use crate::{
    free_pages::{
        Unused,
        Walk, //
    },
    messages::ranges::Ranges,
    rust::mm::{
        contig::{
            contig_pages::ContigPages,
            drain, //
        },
        info::Info,
        memory,
        pages::{
            batch::Batch,
            page::MAX_ORDER,
            page_list::PageList, //
        },
        pfn_range::PfnRange,
        zone::{
            Scan,
            Zone,
            PFNS_PER_HOLD, //
        }, //
    }, //
};

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    workqueue, //
};

/// How many times to allocate and free pages, until the per-CPU page lists are long.
const TRIES: usize = 100;

/// The number of pages of the largest block.
const BLOCK: u64 = 1 << MAX_ORDER;

/// Walks over `range` with any number of holds. Calls `between` after each hold that has found
/// pages. Returns the number of pages.
///
/// # Errors
///
/// `EINVAL` if ranges do not ascend, leave the range, or are shorter than 2^`min_order` pages; or
/// if one hold of a lock scanned too many PFNs.
fn walk_with(
    range: Option<PfnRange>,
    min_order: u32,
    mut between: impl FnMut(u64) -> Result,
) -> Result<u64> {
    let mut walk = Walk::new(range, min_order, PFNS_PER_HOLD)?;
    let (mut pages, mut end) = (0, 0);

    loop {
        let mut most = 0;
        let mut unused = Unused::new(&mut walk, 1, |scan: Scan| most = most.max(scan.pfns));

        while let Some(found) = unused.first() {
            let short = found.len() < 1 << min_order;
            let is_inside = range.and_then(|range| range.intersection(found)) == Some(found);

            if found.first() < end || !is_inside || short {
                return Err(EINVAL);
            }
            end = found.end();
            pages += found.len();
            unused.advance(found.len());
        }
        let over = unused.is_over();

        if most > PFNS_PER_HOLD {
            return Err(EINVAL);
        }
        if over {
            return Ok(pages);
        }
        between(end)?;
    }
}

fn walk(range: Option<PfnRange>, min_order: u32) -> Result<u64> {
    walk_with(range, min_order, |_| Ok(()))
}

/// Walks over all zones one after the other, in any order.
fn walk_zones(min_order: u32) -> Result<u64> {
    let (mut zone, mut pages) = (0, 0);

    while let Some(this) = Zone::nth(zone) {
        pages += walk(this.span(), min_order)?;
        zone += 1;
    }
    Ok(pages)
}

/// Allocates some blocks as order-0 pages, in ascending order. Returns them, and the start of the
/// first one.
fn take(blocks: usize) -> Result<(PageList, u64)> {
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    for _ in 0..blocks {
        batch.alloc(MAX_ORDER, 1, false).map_err(|_| ENOMEM)?;
    }
    let first = batch.first().ok_or(ENOMEM)?.first();
    Ok((batch.take_all(), first))
}

/// Allocates more order-0 pages.
fn take_pages(pages: &mut PageList) -> Result {
    let mut batch = Batch::new()?;

    let _ = batch.alloc(0, BLOCK as usize, false);
    let taken = batch.take_all();
    if taken.is_empty() {
        return Err(ENOMEM);
    }
    pages.append(taken);
    Ok(())
}

/// Frees every second page of a block. Returns the others, and the start of the block.
fn every_second() -> Result<(PageList, u64)> {
    let (mut pages, first) = take(1)?;

    pages.split_alternating(&mut PageList::new());
    drain::drain_free_lists();
    Ok((pages, first))
}

#[kunit_tests(virtio_balloon_rs_free_pages)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_use_are_not_found() {
        let taken = take(1);
        assert!(taken.is_ok());
        let Ok((pages, first)) = taken else { return };

        assert_eq!(walk(PfnRange::new(first, BLOCK), 0), Ok(0));
        drop(pages);
    }

    #[test]
    fn isolated_pages_are_found() {
        // Other tasks may allocate some of them in the meantime, but not each time.
        let found = eventually(|| {
            let (pages, first) = every_second()?;
            let range = PfnRange::new(first, BLOCK);
            let found = walk(range, 0)?;
            let larger = walk(range, 1)?;

            drop(pages);
            Ok(found == BLOCK / 2 && larger == 0)
        });
        assert_eq!(found, Ok(()));
    }

    #[test]
    fn a_range_is_cut_where_it_ends() {
        let taken = every_second();
        assert!(taken.is_ok());
        let Ok((pages, first)) = taken else { return };

        // One of two adjacent pages is free.
        let found = walk(PfnRange::new(first + 100, 2), 0);
        assert!(found.is_ok_and(|found| found <= 1));
        assert_eq!(walk(PfnRange::between(first, first), 0), Ok(0));
        assert_eq!(walk(PfnRange::between(first + BLOCK, first), 0), Ok(0));
        drop(pages);
    }

    #[test]
    fn a_block_is_found_from_its_middle_on() {
        let found = eventually(|| {
            let (pages, first) = take(1)?;

            drop(pages);
            drain::drain_free_lists();
            Ok(walk(PfnRange::new(first + 100, 100), 0)? == 100)
        });
        assert_eq!(found, Ok(()));
    }

    #[test]
    fn only_large_blocks_are_found() {
        let found = eventually(|| {
            let (mut pages, first) = take(1)?;
            let mut rest = PageList::new();

            // The second half is in use.
            pages.split_at(BLOCK as usize / 2, &mut rest);
            drop(pages);
            drain::drain_free_lists();
            let range = PfnRange::new(first, BLOCK);
            let found = walk(range, MAX_ORDER - 1)?;
            let larger = walk(range, MAX_ORDER)?;

            drop(rest);
            Ok(found == BLOCK / 2 && larger == 0)
        });
        assert_eq!(found, Ok(()));
        assert_eq!(walk(Some(PfnRange::ALL), MAX_ORDER + 1), Ok(0));
    }

    #[test]
    fn short_lists_are_not_drained_for_a_walk() -> Result {
        eventually(|| {
            drain::drain_free_lists();
            Ok(!drain::has_long_lists())
        })?;
        let drains = drain::DRAINS.load(Relaxed);

        walk(Some(PfnRange::ALL), MAX_ORDER)?;
        assert_eq!(drain::DRAINS.load(Relaxed), drains);
        Ok(())
    }

    #[cfg(CONFIG_CONTIG_ALLOC)]
    #[test]
    fn long_lists_are_drained_for_a_walk() -> Result {
        // The kernel makes a list longer whenever it has to refill it.
        let enough = memory::total_pages() / 6;
        let has_grown = (0..TRIES).any(|_| {
            let mut pages = PageList::new();
            while pages.len() < enough && take_pages(&mut pages).is_ok() {}
            drop(pages);
            drain::has_long_lists()
        });
        assert!(has_grown);
        let drains = drain::DRAINS.load(Relaxed);

        walk(Some(PfnRange::ALL), MAX_ORDER)?;
        assert_eq!(drain::DRAINS.load(Relaxed), drains + 1);
        assert!(!drain::has_long_lists());
        Ok(())
    }

    #[test]
    fn all_zones_are_walked() {
        drain::drain_free_lists();
        let free = Info::now().free >> kernel::page::PAGE_SHIFT;
        let found = walk_zones(0);
        const SHARE: u64 = 50;

        assert!(
            found.is_ok_and(|found| found + free / SHARE >= free && found <= free + free / SHARE)
        );
    }

    #[test]
    fn lists_can_be_drained_by_many_at_once() {
        const TIMES: usize = 100;
        const OTHERS: usize = 3;

        let drain = || (0..TIMES).for_each(|_| drain::drain_free_lists());
        let over = Arc::new(Atomic::new(0), GFP_KERNEL);
        assert!(over.is_ok());
        let Ok(over) = over else { return };
        for _ in 0..OTHERS {
            let counter = over.clone();
            let spawned = workqueue::system_unbound().try_spawn(GFP_KERNEL, move || {
                drain();
                counter.fetch_add(1, Release);
            });
            assert!(spawned.is_ok());
        }

        drain();
        assert_eq!(eventually(|| Ok(over.load(Acquire) == OTHERS)), Ok(()));
    }

    #[cfg(CONFIG_CONTIG_ALLOC)]
    #[test]
    fn no_range_is_allocated_where_memory_is_isolated() {
        let isolate = |more| {
            (0..)
                .map_while(Zone::nth)
                .for_each(|zone| zone.isolate(more))
        };
        let range = |isolated| {
            let (pages, first) = take(1)?;

            drop(pages);
            drain::drain_free_lists();
            isolate(isolated);
            let range = PfnRange::new(first, BLOCK).and_then(|pfns| ContigPages::new(pfns).ok());
            isolate(-isolated);
            Ok(range.is_some())
        };

        assert!((0..10).all(|_| range(1) == Ok(false)));
        // Other tasks may allocate some of it in the meantime, but not each time.
        assert_eq!(eventually(|| range(0)), Ok(()));
    }

    #[test]
    fn a_list_that_changes_does_no_harm() {
        // The walk finds pages in blocks that are freed and allocated again during the walk.
        let taken = take(4);
        assert!(taken.is_ok());
        let Ok((pages, first)) = taken else { return };
        let mut pages = Some(pages);

        let range = PfnRange::between(first, PfnRange::ALL.end());
        let found = walk_with(range, 0, |_| {
            match pages.take() {
                Some(taken) => drop(taken),
                None => pages = Some(take(4)?.0),
            }
            Ok(())
        });
        assert!(found.is_ok());
    }
}
