// SPDX-License-Identifier: GPL-2.0

//! The state of a round of hints.

#![forbid(unsafe_code)]

use crate::{
    rust::{
        mm::{
            hotplug::memory_block::MemoryBlock,
            memory,
            node::Node,
            pages::{
                block_range::{
                    BlockRange,
                    BlockRangeSet, //
                }, //
                page::{
                    pageblock_order,
                    MAX_ORDER, //
                },
            }, //
        },
        virtio::{
            self,
            ByteOrder,
            Either,
            Virtqueue, //
        },
        virtio_balloon::HINT_STOP,
        work::task::Task, //
    },
    sources::{
        memory_blocks::Offliner,
        nodes, //
    }, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    device::Core,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// Returns the order of the smallest blocks to allocate. A smaller block than a pageblock may come
/// from a pageblock of another migrate type. The kernel would change that type, and raise a
/// watermark.
pub(crate) fn min_order() -> u32 {
    pageblock_order()
}

/// The least free memory for another pass, in kernel pages: 4 MiB.
pub(super) const WORTHWHILE: usize = 1 << (22 - PAGE_SHIFT);

/// How many entries of the queue are reserved for ids: one that ends a round, and one that begins
/// the next. Fewer if the queue has no more: ids then wait until the device has used a hint.
const ROOM_FOR_IDS: usize = 2;

/// The maximum number of stored ranges for each entry of the queue.
pub(crate) const RANGES_PER_ENTRY: usize = 8;

/// A virtqueue for hints: ids and memory.
pub(super) type HintQueue = Virtqueue<Either<KVec<u32>, BlockRange>>;

/// The state of the task. OOM notifiers use it, too, if they get its lock at once.
pub(super) struct Worker {
    pub(super) config: virtio::Config,
    pub(super) queue: HintQueue,
    pub(super) offliner: Option<Arc<Task<Offliner>>>,
    /// The id that was read last.
    pub(super) wanted: u32,
    /// The id of the latest round.
    pub(super) id: u32,
    /// Whether to send the end of a round, and the start of the round with `id`.
    pub(super) stop_due: bool,
    pub(super) start_due: bool,
    /// Whether the round continues, and whether more free memory is available for it.
    pub(super) supplying: bool,
    pub(super) more: bool,
    /// Whether to hold the memory of used buffers.
    pub(super) keeping: bool,
    /// Memory to pass to the device.
    pub(super) pending: BlockRangeSet,
    /// The kernel pages in flight.
    pub(super) in_flight: usize,
}

impl Worker {
    pub(super) fn new(
        dev: &virtio::Device<Core<'_>>,
        queue: HintQueue,
        offliner: Option<Arc<Task<Offliner>>>,
    ) -> Result<Self> {
        let pending = BlockRangeSet::new(queue.size() * RANGES_PER_ENTRY)?;

        Ok(Self {
            config: dev.config()?,
            queue,
            offliner,
            wanted: HINT_STOP,
            id: HINT_STOP,
            stop_due: false,
            start_due: false,
            supplying: false,
            more: false,
            keeping: false,
            pending,
            in_flight: 0,
        })
    }

    /// Ends the round, if there is one.
    pub(super) fn stop(&mut self) {
        self.stop_due |= self.supplying;
        self.supplying = false;
        self.free_pending();
    }

    /// Frees the memory that was not passed to the device yet. Returns its size in kernel pages.
    pub(super) fn free_pending(&mut self) -> usize {
        let mut freed = self
            .offliner
            .as_ref()
            .map_or(0, |offliner| offliner.cancel());

        while let Some(block) = self.pending.pop_block() {
            freed += block.len();
        }
        freed
    }

    /// Begins to take free memory blocks, but not all of them, if the feature is in use.
    pub(super) fn begin_blocks(&self, floor: usize) {
        if let Some(offliner) = &self.offliner {
            let _taking = memory::ReserveGuard::begin();
            let spare = memory::free_above_reserve(floor);

            let rest = spare.checked_rem(MemoryBlock::pages() as usize);

            offliner.begin(spare - rest.unwrap_or(0));
        }
    }

    /// Adopts the blocks that are ready.
    pub(super) fn take_blocks(&mut self) {
        let Some(offliner) = &self.offliner else {
            return;
        };
        // After the end, the blocks that are ready are the last ones.
        self.more = offliner.is_busy();
        let mut pages = offliner.take_over(usize::MAX);

        while let Some(range) = BlockRange::from_block(&mut pages) {
            if self.pending.insert(range).is_err() {
                break;
            }
        }
    }

    /// Returns whether memory blocks are being taken for this round.
    pub(super) fn awaits_blocks(&self) -> bool {
        self.more && self.offliner.is_some()
    }

    /// Sends the ids that are due. Returns whether none is left.
    pub(super) fn send_ids(&mut self, order: ByteOrder) -> bool {
        if self.stop_due {
            self.stop_due = !self.send_id(HINT_STOP, order);
        }
        if self.start_due && !self.stop_due {
            self.start_due = !self.send_id(self.id, order);
        }

        !self.stop_due && !self.start_due
    }

    fn send_id(&mut self, id: u32, order: ByteOrder) -> bool {
        let Ok(mut buffer) = KVec::with_capacity(1, GFP_NOWAIT | __GFP_NOWARN) else {
            return false;
        };

        // There is room for one.
        let _ = buffer.push_within_capacity(order.to_device32(id));
        self.queue.add(Either::Left(buffer)).is_ok()
    }

    /// Allocates free memory, but not all of it: from each node in proportion.
    pub(super) fn gather(&mut self, floor: usize, needed: &Atomic<bool>) {
        let _taking = memory::ReserveGuard::begin();
        let wanted = memory::free_above_reserve(floor);
        let all = Node::all().map(Node::kernel_free_pages).sum();

        for node in Node::all() {
            let share = nodes::part(wanted, node.kernel_free_pages(), all);

            self.gather_from(node, share.min(nodes::room(node, floor)), needed);
        }
        self.more = self.pending.pages() >= WORTHWHILE;
    }

    /// Allocates up to `wanted` kernel pages of `node`.
    fn gather_from(&mut self, node: Node, wanted: usize, needed: &Atomic<bool>) {
        let wanted = self.pending.pages() + wanted;
        let mut order = MAX_ORDER;

        while !needed.load(Relaxed) {
            // A block may have up to 512 MiB: a block larger than the rest would leave the guest
            // below its reserve.
            let missing = wanted.saturating_sub(self.pending.pages());
            order = order.min(missing.checked_ilog2().unwrap_or(0));
            if order < min_order() {
                break;
            }
            let Some(range) = BlockRange::alloc(Some(node), order) else {
                order -= 1;
                continue;
            };
            if self.pending.insert(range).is_err() {
                break;
            }
        }
    }

    /// Passes as much memory to the device as the queue has room for. Returns whether it did.
    pub(super) fn supply(&mut self) -> bool {
        let before = self.in_flight;
        let reserved = ROOM_FOR_IDS.min(self.queue.size().saturating_sub(1));

        while self.queue.room() > reserved {
            let Some(range) = self.pending.take_longest() else {
                break;
            };
            let pages = range.len();

            if self.queue.add(Either::Right(range)).is_err() {
                break;
            }
            self.in_flight += pages;
        }
        self.in_flight > before
    }
}
