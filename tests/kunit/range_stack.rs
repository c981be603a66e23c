// SPDX-License-Identifier: GPL-2.0

use crate::rust::mm::{
    contig::page_list_tests::MemoryError,
    pages::{
        page_list::PageList,
        range_stack::RangeStack, //
    }, //
};

use super::pages::block as neighbours;

use kernel::{
    prelude::*,
    rbtree::RBTree, //
};

/// Takes all pages from `stack` in portions of up to `max` pages, and from `expected`.
///
/// # Errors
///
/// `EINVAL` if a page is missing, is there twice, or was not expected, or if a portion is too
/// large.
fn drain(stack: &mut RangeStack, max: u64, mut expected: RBTree<u64, ()>) -> Result {
    while let Some(range) = stack.take(max) {
        if range.len() == 0 || range.len() > max {
            return Err(EINVAL);
        }
        for pfn in range.first()..range.end() {
            expected.remove(&pfn).ok_or(EINVAL)?;
        }
    }

    (expected.iter().next().is_none() && stack.is_empty())
        .then_some(())
        .ok_or(EINVAL)
}

/// Returns the page frame numbers of `pages`.
fn numbers(pages: &PageList) -> Result<RBTree<u64, ()>> {
    let mut numbers = RBTree::new();

    for pfn in pages.pfns() {
        numbers.try_create_and_insert(pfn, (), GFP_KERNEL)?;
    }
    Ok(numbers)
}

/// Records `pages` and reads them back in portions of up to `max` pages. Returns how many pages
/// became backlog pages, or an error if the pages differ.
fn round_trip(mut pages: PageList, max: u64) -> Result<usize> {
    let expected = numbers(&pages)?;
    let before = pages.len();
    let mut stack = RangeStack::new();
    stack.record(&mut pages);
    let carriers = before - pages.len();

    drain(&mut stack, max, expected)?;
    Ok(carriers)
}

/// Records 2^`order` pages, of which the one that is recorded first has a memory error. Returns
/// whether that page became a backlog page, and how many pages the stack has then.
fn record_error(order: u32) -> Result<(bool, usize)> {
    let mut pages = neighbours(order)?;
    let mut expected = numbers(&pages)?;
    let mut stack = RangeStack::new();
    let Some(error) = MemoryError::of_last(&pages) else {
        return Ok((false, expected.iter().count()));
    };

    stack.record(&mut pages);
    let is_used = !pages.pfns().any(|pfn| pfn == error.pfn());
    drop(error);
    let mut recorded = 0;
    while let Some(range) = stack.take(1) {
        expected.remove(&range.first()).ok_or(EINVAL)?;
        recorded += 1;
    }
    Ok((is_used, recorded))
}

/// Allocates 2^`order` pages, none of which are adjacent.
fn lone_pages(order: u32) -> Result<PageList> {
    let mut pages = neighbours(order + 1)?;

    pages.split_alternating(&mut PageList::new());
    Ok(pages)
}

#[kunit_tests(virtio_balloon_rs_range_stack)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_stack_has_nothing_to_take() {
        let mut stack = RangeStack::new();

        assert!(stack.is_empty());
        assert_eq!(stack.take(1), None);
        stack.record(&mut PageList::new());
        assert!(stack.is_empty());
    }

    #[test]
    fn one_page_carries_itself() {
        assert_eq!(
            neighbours(0).and_then(|pages| round_trip(pages, u64::MAX)),
            Ok(1)
        );
    }

    #[test]
    fn neighbours_share_a_range() {
        assert_eq!(
            neighbours(10).and_then(|pages| round_trip(pages, u64::MAX)),
            Ok(1)
        );
    }

    #[test]
    fn a_range_can_be_taken_in_portions() {
        for max in [1, 2, 3, 255, 256, 257] {
            assert_eq!(
                neighbours(9).and_then(|pages| round_trip(pages, max)),
                Ok(1)
            );
        }
    }

    #[test]
    fn isolated_pages_need_a_backlog_page_for_each_few_hundred() {
        let carriers = lone_pages(9).and_then(|pages| round_trip(pages, u64::MAX));

        // 512 isolated pages; about 255 ranges fit on a 4 KiB page.
        assert!(carriers.is_ok_and(|n| (1..=3).contains(&n)));
    }

    #[test]
    fn a_page_with_a_memory_error_stores_no_ranges() {
        assert_eq!(record_error(4), Ok((false, 16)));
        // There is no other page.
        assert!(record_error(0).is_ok_and(|(is_used, _)| !is_used));
    }

    #[test]
    fn nothing_is_taken_for_a_portion_of_nothing() {
        let pages = neighbours(1);
        let mut stack = RangeStack::new();

        assert!(pages.is_ok());
        stack.record(&mut pages.unwrap_or(PageList::new()));
        assert_eq!(stack.take(0), None);
        assert!(!stack.is_empty());
    }
}
