// SPDX-License-Identifier: GPL-2.0

//! Pages from the page allocator, in blocks as large as possible.

#![forbid(unsafe_code)]

use crate::{
    rust::mm::{
        memory,
        pages::{
            batch::{
                AllocError,
                Batch, //
            },
            page::{
                pageblock_order,
                MAX_ORDER, //
            }, //
        }, //
    },
    sources::source::Source, //
};

use kernel::page::PAGE_SHIFT;

/// How many kernel pages are allocated at a time, and how many may be in flight, if the kernel
/// zeroes the memory that it allocates: 4 and 16 MiB. The guest uses at most so much more of the
/// host's memory meanwhile, and the device works while the kernel zeroes the next pages.
const ZEROED_PORTION: usize = 1 << (22 - PAGE_SHIFT);
const ZEROED_IN_FLIGHT: usize = 4 * ZEROED_PORTION;

/// The kind of block to allocate next.
#[derive(Clone, Copy)]
struct Kind {
    order: u32,
    /// Whether the block stays one.
    unsplit: bool,
}

impl Kind {
    /// Returns what comes first.
    fn first(unsplit: bool) -> Self {
        Self {
            order: MAX_ORDER,
            unsplit,
        }
    }

    /// Returns the kind for at most `pages` kernel pages. `None` if there is none.
    fn up_to(self, pages: usize) -> Option<Self> {
        let order = self.order.min(pages.checked_ilog2()?);

        Some(Self {
            order,
            unsplit: self.unsplit && order >= pageblock_order(),
        })
    }

    /// Returns the next kind when there is no such block: smaller ones and, after the smallest that
    /// may stay unsplit, movable ones from everywhere. `None` after an order-0 page.
    ///
    /// Order-0 pages follow pageblocks. To fail for an order between them costs more than it saves:
    /// the kernel would begin to compact memory for it. Only the rest of a target has such orders.
    fn next(self) -> Option<Self> {
        match self.order {
            0 => None,
            order if order > pageblock_order() => Some(Self {
                order: order - 1,
                ..self
            }),
            _ if self.unsplit => Some(Self::first(false)),
            _ => Some(Self { order: 0, ..self }),
        }
    }

    /// Returns into how many blocks such a block is split.
    fn blocks(self) -> usize {
        if self.unsplit {
            1
        } else {
            1 << self.order
        }
    }
}

/// The page allocator.
pub(crate) struct PageAllocator<F: Fn() -> usize> {
    /// The kind to try next: kinds that were not available are not tried again. `None` before the
    /// first attempt.
    kind: Option<Kind>,
    spare: F,
}

impl<F: Fn() -> usize> PageAllocator<F> {
    /// Begins with the largest blocks. `spare` returns how many kernel pages the guest can do
    /// without.
    pub(crate) fn new(spare: F) -> Self {
        Self { kind: None, spare }
    }
}

impl<F: Fn() -> usize> Source for PageAllocator<F> {
    fn limits(&self) -> (usize, usize) {
        match memory::is_zeroed_on_allocation() {
            true => (ZEROED_PORTION, ZEROED_IN_FLIGHT),
            false => (usize::MAX, usize::MAX),
        }
    }

    fn spare(&self) -> usize {
        (self.spare)()
    }

    /// Blocks are much cheaper than order-0 pages, and leave fewer holes. If there is none of a
    /// kind, try the next kind.
    fn gather(&mut self, batch: &mut Batch, wanted: usize, blocks: usize, unsplit: bool) {
        let kind = self.kind.get_or_insert(Kind::first(unsplit));

        while let Some(this) = kind.up_to(wanted - batch.pages()) {
            if batch.blocks() + this.blocks() > blocks {
                break;
            }

            match batch.alloc(this.order, wanted - batch.pages(), this.unsplit) {
                Ok(()) => (),
                Err(AllocError::Full) => break,
                Err(AllocError::NoBlock) => {
                    let Some(next) = this.next() else {
                        break;
                    };
                    *kind = next;
                }
            }
        }
    }
}
