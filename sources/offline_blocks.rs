// SPDX-License-Identifier: GPL-2.0

//! Memory blocks that are offline: those that stay so on purpose, and those that the kernel could
//! not bring online.
//!
//! Whenever a block goes offline or comes online, the kernel checks the zone for holes: one
//! pageblock after the other, from the zone's begin to the first hole. The first block that is
//! taken of a zone is that hole until the others are taken. Otherwise the kernel would walk over
//! large parts of the zone twice for each block.

#![forbid(unsafe_code)]

use crate::{
    device::timeouts,
    rust::{
        mm::{
            hotplug::memory_block::{
                Limits,
                MemoryBlock,
                OfflineBlock,
                Outcome, //
            },
            zone::Zone, //
        },
        work::thread::Thread, //
    }, //
};

use core::mem;
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// How many blocks may be offline after a failure to bring them online, until no more are taken.
const MAX_FAILED: usize = 4;

/// The first block that is taken of a zone.
struct First {
    block: MemoryBlock,
    zone: Zone,
    offline: OfflineBlock,
}

/// Both kinds of blocks. The lists never grow beyond their capacity.
pub(super) struct OfflineBlocks {
    first: KVec<First>,
    failed: KVec<OfflineBlock>,
}

impl OfflineBlocks {
    /// Returns none.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<Self> {
        let zones = Zone::all().count();

        Ok(Self {
            first: KVec::with_capacity(zones, GFP_KERNEL)?,
            failed: KVec::with_capacity(MAX_FAILED + zones, GFP_KERNEL)?,
        })
    }

    /// Returns how many kernel pages the first blocks have.
    pub(super) fn first_pages(&self) -> u64 {
        self.first.len() as u64 * MemoryBlock::pages()
    }

    /// Takes `block` offline if it is the first of its zone and `is_wanted`. Returns `None` if it
    /// is another one.
    pub(super) fn add_first(
        &mut self,
        block: MemoryBlock,
        limits: Limits,
        is_wanted: impl FnOnce() -> bool,
    ) -> Option<Result> {
        let zone = block.zone()?;
        let is_known = self.first.iter().any(|first| first.zone == zone);
        if is_known || self.first.len() == self.first.capacity() {
            return None;
        }

        Some(block.take_first(limits, is_wanted).map(|offline| {
            let _ = self.first.push_within_capacity(First {
                block,
                zone,
                offline,
            });
        }))
    }

    /// Takes the rest of a first block.
    pub(super) fn take_first(&mut self) -> Option<Outcome> {
        let First { block, offline, .. } = self.first.pop()?;

        Some(block.take_rest(offline))
    }

    /// Adds a block that could not be brought online.
    pub(super) fn fail(&mut self, block: OfflineBlock) {
        let _ = self.failed.push_within_capacity(block);
    }

    /// Returns whether so many could not be brought online that no more may be taken.
    pub(super) fn has_failed_too_often(&self) -> bool {
        self.failed.len() >= MAX_FAILED
    }

    /// Retries to bring these online. Returns whether none of them is offline any more.
    pub(super) fn bring_online(&mut self) -> bool {
        bring_online(&mut self.failed)
    }
}

impl Drop for OfflineBlocks {
    /// Leaves the blocks that could not be brought online to a thread. ACPI unplugs a device with
    /// the kernel's lock for hotplug held, and they stay offline until that has ended.
    fn drop(&mut self) {
        let mut left = Left {
            blocks: mem::replace(&mut self.failed, KVec::new()),
            time: timeouts::ONLINE_WITHOUT_THREAD,
        };
        if left.blocks.is_empty() {
            return;
        }

        // No thread starts while the module is being unloaded. The blocks are dropped here then.
        let thread = Thread::start(c"balloon_rs_online", None, move || {
            left.time = timeouts::ONLINE_AT_END;
            drop(left);
            Ok(())
        });
        if let Ok(thread) = thread {
            thread.detach();
        }
    }
}

/// Blocks that are still offline at the end. Dropping it retries.
struct Left {
    blocks: KVec<OfflineBlock>,
    /// For how long.
    time: Delta,
}

impl Drop for Left {
    fn drop(&mut self) {
        let start = Instant::<Monotonic>::now();

        while !bring_online(&mut self.blocks) && start.elapsed() < self.time {
            fsleep(Delta::from_millis(timeouts::ONLINE_AGAIN.into()));
        }
        if !self.blocks.is_empty() {
            pr_warn!(
                "{} memory blocks are offline and cannot be brought online\n",
                self.blocks.len()
            );
        }
    }
}

/// Retries to bring `blocks` online. Returns whether none of them is offline any more.
fn bring_online(blocks: &mut KVec<OfflineBlock>) -> bool {
    blocks.retain(|block| block.bring_online().is_err());
    blocks.is_empty()
}
