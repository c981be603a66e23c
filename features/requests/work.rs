// SPDX-License-Identifier: GPL-2.0

//! What a request of the host asks for.

#![forbid(unsafe_code)]

use crate::{
    free_pages::Walk,
    rust::{
        mm::{
            hotplug::memory_block::MemoryBlock,
            memory,
            pages::page::pageblock_order,
            zone::PFNS_PER_HOLD, //
        },
        virtio_balloon::{
            request,
            Request, //
        },
        work::{
            task::Task,
            thread::Thread, //
        }, //
    },
    sources::memory_blocks::Offliner, //
};

use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::Arc, //
};

/// How many kernel pages are kept from being used for one message, unless a pageblock is larger,
/// and for how many messages: 64 MiB, four times.
const CLAIM_PAGES: u64 = 1 << (26 - PAGE_SHIFT);
pub(super) const MAX_RANGES: usize = 4;

/// The first of these where the kernel writes to what is allocated, so that the host needs hardly
/// more memory for a while: 4 MiB.
const ZEROED_CLAIM_PAGES: u64 = 1 << (22 - PAGE_SHIFT);

/// A request that was not completed.
pub(super) struct Open {
    pub(super) id: u64,
    pub(super) work: Work,
}

impl Open {
    /// Returns whether memory blocks are to be taken for the request.
    pub(super) fn needs_blocks(&self) -> bool {
        matches!(&self.work, Work::Discard(discard) if discard.blocks.is_some())
    }
}

/// What is left to be done for a request.
pub(super) enum Work {
    /// To name the blocks that the walk yields.
    Skip(Walk),
    /// To name memory, and keep it from being used.
    Discard(Discard),
    /// To drop caches, which another request may be doing just now.
    DropCaches(Caches),
    /// Caches are being dropped.
    CacheDropper(Thread),
    /// To say that it is over, and how it went.
    Complete(u8),
}

/// What is left to be named of memory that is kept from being used.
pub(super) struct Discard {
    /// Memory blocks come first, if they are taken at all.
    pub(super) blocks: Option<Blocks>,
    /// The walk's memory comes next, except for these blocks.
    pub(super) walk: Walk,
    pub(super) named: KVec<MemoryBlock>,
}

/// Memory blocks that are taken for a request.
pub(super) struct Blocks {
    pub(super) offliner: Arc<Task<Offliner>>,
    pub(super) is_begun: bool,
}

/// What caches to drop.
#[derive(Clone, Copy)]
pub(super) struct Caches {
    pub(super) pages: bool,
    pub(super) slab: bool,
}

impl Work {
    /// Returns what there is to do for `request`. Memory blocks are allocated by `taker`, if there is
    /// one.
    pub(super) fn plan(request: &Request, offliner: Option<&Arc<Task<Offliner>>>) -> Self {
        match u16::from_le(request.command) {
            // Where free pages have to hold some value, a copy must not lack it; and the kernel
            // would write to all pages that were discarded, when they are free again.
            request::UNUSED_SKIP | request::UNUSED_DISCARD
                if memory::free_page_value().is_some() =>
            {
                Work::Complete(request::ABORTED)
            }
            request::UNUSED_SKIP => match walk(request, 0, PFNS_PER_HOLD) {
                Ok(walk) => Work::Skip(walk),
                Err(_) => Work::Complete(request::ABORTED),
            },
            // No more at a time than what is taken at once: what lies beyond would have to be
            // looked at again.
            request::UNUSED_DISCARD => match walk(
                request,
                pageblock_order(),
                (range_pages() >> pageblock_order()) as usize,
            ) {
                Ok(walk) => Work::Discard(Discard {
                    // They may lie anywhere.
                    blocks: offliner
                        .filter(|_| request.start == 0 && request.end == 0)
                        .map(|offliner| Blocks {
                            offliner: offliner.clone(),
                            is_begun: false,
                        }),
                    walk,
                    named: KVec::new(),
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

/// Returns how many kernel pages are kept from being used for one message.
pub(super) fn range_pages() -> u64 {
    let pages = match memory::is_zeroed_on_allocation() {
        true => ZEROED_CLAIM_PAGES,
        false => CLAIM_PAGES,
    };

    pages.max(1 << pageblock_order())
}

/// Returns the walk that `request` asks for, for blocks of 2^`least` pages at least, `blocks` of
/// them at a time.
fn walk(request: &Request, least: u32, blocks: usize) -> Result<Walk> {
    let order = u32::from(request.block_shift).saturating_sub(PAGE_SHIFT as u32);
    let start = u64::from_le(request.start).div_ceil(PAGE_SIZE as u64);
    let end = match u64::from_le(request.end) {
        0 => u64::MAX,
        end => end,
    } >> PAGE_SHIFT;

    Walk::new(start..end, order.max(least), blocks)
}
