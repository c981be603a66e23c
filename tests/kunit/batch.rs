// SPDX-License-Identifier: GPL-2.0

use super::device::free;
use crate::rust::mm::{
    contig::drain,
    pages::{
        batch::{
            AllocError,
            Batch, //
        },
        page::MAX_ORDER,
        page_list::PageList, //
    }, //
};

use kernel::prelude::*;

/// Collects blocks of these orders.
fn gather(orders: &[u32], unsplit: bool) -> Result<Batch> {
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    for &order in orders {
        batch.alloc(order, 1, unsplit).map_err(|_| ENOMEM)?;
    }
    Ok(batch)
}

/// Takes out all blocks one by one. Returns the number of blocks and of pages.
///
/// # Errors
///
/// `EINVAL` if they do not ascend, or if the list differs from the blocks.
fn empty(batch: &mut Batch) -> Result<(usize, usize)> {
    let mut list = PageList::new();
    let (mut blocks, mut pages, mut end) = (0, 0, 0);

    while let Some(block) = batch.first() {
        if block.first() < end || batch.first() != Some(block) {
            return Err(EINVAL);
        }
        end = block.end();
        blocks += 1;
        pages += block.len() as usize;

        batch.take_first(&mut list);
        if list.len() != pages {
            return Err(EINVAL);
        }
    }

    (batch.pages() == 0 && batch.blocks() == 0)
        .then_some((blocks, pages))
        .ok_or(EINVAL)
}

#[kunit_tests(virtio_balloon_rs_batch)]
mod tests {
    use super::*;

    #[test]
    fn single_pages_come_in_order() {
        let batch = gather(&[0, 3, 6, 0, 7, 0, 9], false);
        assert!(batch.is_ok());
        let Ok(mut batch) = batch else { return };

        let pages = 1 + 8 + 64 + 1 + 128 + 1 + 512;
        assert_eq!(batch.pages(), pages);
        assert_eq!(batch.blocks(), pages);
        assert_eq!(empty(&mut batch), Ok((pages, pages)));
    }

    #[test]
    fn blocks_stay_whole_in_order() {
        let batch = gather(&[MAX_ORDER; 8], true);
        assert!(batch.is_ok());
        let Ok(mut batch) = batch else { return };

        assert_eq!(batch.blocks(), 8);
        assert_eq!(empty(&mut batch), Ok((8, 8 << MAX_ORDER)));
    }

    #[test]
    fn small_blocks_are_split() {
        let batch = gather(&[4, 0], true);

        assert!(batch.is_ok_and(|batch| batch.blocks() == 17));
    }

    #[test]
    fn taken_pages_can_be_added() {
        let batch = gather(&[MAX_ORDER, 5, 0], true);
        assert!(batch.is_ok());
        let Ok(mut batch) = batch else { return };
        let mut list = batch.take_all();

        assert_eq!(empty(&mut batch), Ok((0, 0)));
        batch.add(&mut list);
        assert!(list.is_empty());
        assert_eq!(empty(&mut batch), Ok((34, (1 << MAX_ORDER) + 33)));
    }

    #[test]
    fn pages_can_be_added_while_others_are_taken() {
        let batch = gather(&[6, 6], false);
        assert!(batch.is_ok());
        let Ok(mut batch) = batch else { return };
        let mut list = PageList::new();

        for _ in 0..100 {
            batch.take_first(&mut list);
        }
        batch.add(&mut list);
        assert_eq!(empty(&mut batch), Ok((128, 128)));
    }

    #[test]
    fn an_impossible_order_is_no_block() {
        let batch = Batch::new();

        assert!(
            batch.is_ok_and(
                |mut batch| batch.alloc(MAX_ORDER + 1, 1, true) == Err(AllocError::NoBlock)
            )
        );
    }

    #[test]
    fn a_batch_that_is_dropped_frees_everything() {
        const NOISE: u64 = 1 << 20;
        let before = free();

        drop(gather(&[MAX_ORDER; 8], true));
        drop(gather(&[MAX_ORDER; 8], false));
        assert!(free() + NOISE >= before);
    }
}
