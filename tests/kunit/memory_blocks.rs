// SPDX-License-Identifier: GPL-2.0

//! Memory blocks: what keeps one from being taken.

#![forbid(unsafe_code)]

use super::device::{
    Host,
    BASE, //
};
use crate::{
    balloon::target::BALLOON_PAGES_PER_PAGE,
    rust::{
        fs::file,
        mm::{
            contig::Claim,
            hotplug::Turn,
            memory,
            memory_block::{
                MemoryBlock,
                Taken, //
            }, //
        }, //
    }, //
};

use core::ops::Range;
use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::Msecs, //
};

/// How long the kernel may try to take a block offline.
const PATIENCE: Msecs = 1_000;

/// How many blocks the guest has at most.
const BLOCKS: u64 = 64;

/// Returns the blocks that could be taken now. On arm64 the kernel takes no memory offline that was
/// there at boot.
fn blocks() -> impl Iterator<Item = MemoryBlock> {
    let pages = MemoryBlock::pages();

    (0..BLOCKS)
        .filter_map(move |number| MemoryBlock::of(number * pages, pages))
        .filter(|block| block.can_be_taken())
}

/// Returns whether no block can be taken in any guest with this kernel. Tests of a driver that is built
/// in run before /sys is mounted.
fn has_none() -> bool {
    MemoryBlock::pages() == 0 || cfg!(CONFIG_ARM64) || !cfg!(MODULE)
}

#[kunit_tests(virtio_balloon_rs_memory_blocks)]
mod tests {
    use super::*;

    #[test]
    fn no_memory_is_isolated_while_a_block_is_taken() {
        if has_none() {
            return;
        }
        let claim = || {
            // Others may isolate memory for a moment.
            (0..10).any(|_| {
                blocks().any(|block| {
                    let len = 1 << memory::page_block_order();
                    Claim::new(block.pfns().start, len).is_some()
                })
            })
        };

        // A failed assertion would keep the turn.
        let turn = Turn::wait();
        let claimed = claim();
        drop(turn);
        assert!(!claimed);
        assert!(claim());
    }

    #[test]
    fn a_block_in_use_stays_online() -> Result {
        /// As many balloon pages as there are in 128 MiB.
        const STEP: u32 = 1 << 15;
        /// How much of that there is in any case.
        const STEPS: u32 = 5;
        if has_none() {
            return Ok(());
        }
        let mut takeable = KVec::new();
        for block in blocks() {
            takeable.push(block, GFP_KERNEL)?;
        }
        let mut host = Host::new(&BASE)?;
        let mut in_use = None;
        // Until the balloon has some of one of them.
        for steps in 1..=STEPS {
            host.resize(steps * STEP, steps * STEP)?;
            let has = |pfns: &Range<u64>| {
                host.inflated
                    .iter()
                    .any(|&pfn| pfns.contains(&(u64::from(pfn) / BALLOON_PAGES_PER_PAGE as u64)))
            };
            in_use = takeable.iter().find(|block| has(&block.pfns()));
            if in_use.is_some() {
                break;
            }
        }
        assert!(in_use.is_some());

        // The kernel can move single pages of the balloon, and would, with its locks held.
        let taken = in_use.map(|block| block.take(PATIENCE));
        assert!(matches!(taken, Some(Taken::Not(EPERM))));
        Ok(())
    }

    #[test]
    fn a_block_that_comes_online_as_movable_is_not_kept() -> Result {
        if has_none() {
            return Ok(());
        }
        let (total, block) = (memory::total_pages(), blocks().next());
        assert!(block.is_some());
        let Some(block) = block else { return Ok(()) };

        let taken = block.take_and_write(PATIENCE, c"online_movable");
        assert!(matches!(taken, Taken::Not(EINVAL)));
        block.take_offline(PATIENCE)?.bring_online()?;
        assert_eq!(memory::total_pages(), total);

        // And else it is.
        let taken = block.take(PATIENCE);
        assert!(
            matches!(&taken, Taken::Pages(pages) if pages.len() as u64 == MemoryBlock::pages())
        );
        drop(taken);
        assert_eq!(memory::total_pages(), total);
        Ok(())
    }

    #[test]
    fn no_file_is_opened_while_a_block_is_offline() {
        if has_none() {
            return;
        }
        // The file is opened before the block goes offline, and once is enough.
        let opened = blocks().find_map(|block| {
            let before = file::OPENED.load(Relaxed);
            let taken = block.take(PATIENCE);

            matches!(taken, Taken::Pages(_)).then(|| file::OPENED.load(Relaxed) - before)
        });
        assert_eq!(opened, Some(1));
    }
}
