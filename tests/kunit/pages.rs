// SPDX-License-Identifier: GPL-2.0

use crate::rust::{
    balloon_pages::{
        BalloonPages,
        OldPage,
        Replace, //
    },
    memory,
    page_list::{
        PageList,
        MAX_ORDER, //
    },
};

use kernel::prelude::*;

/// Allocates a list of 2^`order` pages.
fn block(order: u32) -> Result<PageList> {
    let mut pages = PageList::new();

    pages.alloc_block(order).then_some(pages).ok_or(ENOMEM)
}

/// Nobody moves a page in these tests.
struct Fixed;

impl Replace for Fixed {
    fn replace(&self, _old: &OldPage<'_>, _new: u64, _may_sleep: bool) -> Result {
        Err(EAGAIN)
    }
}

fn balloon() -> Result<Pin<KBox<BalloonPages<Fixed>>>> {
    KBox::pin_init(BalloonPages::new(true, Ok(Fixed)), GFP_KERNEL)
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
        let mut pages = PageList::new();

        assert!(!pages.alloc_block(MAX_ORDER + 1));
        assert!(pages.is_empty());
    }

    #[test]
    fn blocks_are_appended() {
        let mut pages = PageList::new();

        assert!(pages.alloc_block(3));
        assert!(pages.alloc_block(0));
        assert_eq!(pages.len(), 9);
        assert_eq!(pages.pfns().count(), 9);
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

        let some = balloon.take(10);
        assert_eq!(some.len(), 10);
        assert_eq!(balloon.len(), 54);
        assert_eq!(memory::total_pages(), total - 54);
        assert_eq!(memory::ballooned_pages(), ballooned + 54);

        // What was taken out of one block comes out in order, so that it goes back as a block.
        assert!(consecutive(&some));

        // More than there is.
        assert_eq!(balloon.take(1_000).len(), 54);
        assert!(balloon.take(1).is_empty());
        assert_eq!(memory::total_pages(), total);
        assert_eq!(memory::ballooned_pages(), ballooned);
    }

    #[test]
    fn a_balloon_that_is_dropped_gives_everything_back() {
        let (total, ballooned) = (memory::total_pages(), memory::ballooned_pages());

        {
            let balloon = balloon();
            assert!(balloon.is_ok());
            let Ok(balloon) = balloon else { return };

            balloon.insert(block(MAX_ORDER).unwrap_or(PageList::new()));
            assert_eq!(memory::ballooned_pages(), ballooned + (1 << MAX_ORDER));
        }

        assert_eq!(memory::total_pages(), total);
        assert_eq!(memory::ballooned_pages(), ballooned);
    }
}
