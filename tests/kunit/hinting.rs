// SPDX-License-Identifier: GPL-2.0

//! Free page hinting on a device in the kernel.

use super::device::{
    eventually,
    free, //
};
#[cfg(CONFIG_PM_SLEEP)]
use super::memory_blocks::{
    has_none,
    is_online_without_restore, //
};
use crate::{
    features::hinting::worker::{
        min_order,
        RANGES_PER_ENTRY, //
    },
    rust::{
        mm::{
            contig::drain,
            info::Info,
            memory,
            pages::{
                batch::Batch,
                block_range::BlockRange, //
                page::{
                    pageblock_order,
                    MAX_ORDER, //
                },
                page_list::PageList,
            }, //
        },
        virtio::{
            fake_device::{
                FakeDevice,
                Request,
                QUEUE_SIZE, //
            },
            FeatureBit, //
        },
        virtio_balloon::{
            F_FREE_PAGE_HINT,
            HINT_DONE,
            HINT_ID,
            HINT_STOP, //
        }, //
    }, //
};

use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The queue's number: the device has no statistics.
const HINTS: usize = 2;

const MIB: u64 = 1 << 20;

fn device() -> Result<FakeDevice> {
    FakeDevice::new(&[FeatureBit::VERSION_1, F_FREE_PAGE_HINT])
}

/// A message of the driver.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    Id(u32),
    Memory(usize),
}

/// Waits for the next message.
///
/// # Errors
///
/// `ETIMEDOUT` if there is none, `EINVAL` if it is neither an id nor memory.
fn next(device: &FakeDevice) -> Result<(Request, Message)> {
    let mut request = None;

    eventually(|| {
        request = device.next(HINTS)?;
        Ok(request.is_some())
    })?;

    let request = request.ok_or(EINVAL)?;
    let pfns = request.pfns()?;
    let message = match (pfns.as_slice(), request.writable) {
        (&[id], 0) => Message::Id(id),
        ([], 1..) => Message::Memory(request.writable),
        _ => return Err(EINVAL),
    };

    Ok((request, message))
}

fn answer(device: &FakeDevice, request: &Request) -> Result {
    device.answer(HINTS, request, 0)?;
    device.interrupt(HINTS)
}

/// Uses all messages of a round. Returns how many bytes were hinted.
///
/// # Errors
///
/// `EINVAL` if the round does not have the id `id`, `ELOOP` if more is hinted than the guest has.
fn round(device: &FakeDevice, id: u32) -> Result<u64> {
    let (request, message) = next(device)?;
    let total = Info::now().total;
    let mut hinted = 0;

    if message != Message::Id(id) {
        return Err(EINVAL);
    }
    answer(device, &request)?;

    loop {
        let (request, message) = next(device)?;

        answer(device, &request)?;
        match message {
            Message::Memory(bytes) => hinted += bytes as u64,
            Message::Id(HINT_STOP) => return Ok(hinted),
            Message::Id(_) => return Err(EINVAL),
        }
        if hinted > total {
            return Err(ELOOP);
        }
    }
}

/// Fragments nearly all free memory into separate ranges of the shortest length for hints. Returns
/// the memory between them, and their number.
fn cut_up() -> Result<(KVVec<BlockRange>, usize)> {
    const REST: u64 = 48 * MIB;
    let mut kept = KVVec::new();

    drain::drain_free_lists();
    while Info::now().free > REST {
        let Some(range) = BlockRange::alloc(None, min_order()) else {
            break;
        };
        kept.push(range, GFP_KERNEL)?;
    }

    let all = kept.len();
    kept.retain(|range| range.first() >> min_order() & 1 == 1);
    let ranges = all - kept.len();
    Ok((kept, ranges))
}

/// Fragments nearly all free memory into halves of movable pageblocks. Returns the other halves.
fn halve_page_blocks() -> Result<KVVec<PageList>> {
    const REST: u64 = 48 * MIB;
    let half = pageblock_order() - 1;
    let mut halves = KVVec::new();
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    while Info::now().free > REST && batch.alloc(half, 1, false).is_ok() {
        halves.push(batch.take_all(), GFP_KERNEL)?;
    }
    halves.retain(|half_block| {
        let first = half_block.pfns().next();

        first.is_some_and(|pfn| pfn >> half & 1 == 1)
    });
    Ok(halves)
}

/// Fragments nearly all free memory into halves of unmovable pageblocks, so that the kernel raises
/// a watermark for a movable half. Returns the memory between them.
///
/// # Errors
///
/// `ENOENT` if it raises none.
fn halve_unmovable() -> Result<(KVVec<BlockRange>, KVVec<PageList>)> {
    const REST: u64 = 48 * MIB;
    let half = pageblock_order() - 1;
    let (mut kept, mut movable) = (KVVec::new(), KVVec::new());
    let mut batch = Batch::new()?;

    drain::drain_free_lists();
    while Info::now().free > REST {
        let Some(range) = BlockRange::alloc(None, half) else {
            break;
        };
        kept.push(range, GFP_KERNEL)?;
    }
    kept.retain(|range| range.first() >> half & 1 == 1);
    while let Some(range) = BlockRange::alloc(None, pageblock_order()) {
        kept.push(range, GFP_KERNEL)?;
    }
    memory::boost(0);
    while memory::boosted_pages() == 0 {
        batch.alloc(half, 1 << half, false).map_err(|_| ENOENT)?;
        movable.push(batch.take_all(), GFP_KERNEL)?;
    }
    Ok((kept, movable))
}

/// Waits until about as much memory is free as before.
fn is_free_again(before: u64) -> Result {
    eventually(|| Ok(free() + 8 * MIB > before))
}

#[kunit_tests(virtio_balloon_rs_hinting)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_hinted_without_a_request() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        for id in [HINT_STOP, HINT_DONE] {
            device.change(HINT_ID, id);
            fsleep(Delta::from_millis(20));
            assert!(device.next(HINTS).is_ok_and(|next| next.is_none()));
        }
    }

    #[test]
    fn most_free_memory_is_hinted_and_comes_back_when_all_is_done() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };
        let before = free();

        device.change(HINT_ID, 2);
        let hinted = round(&device, 2);
        assert!(hinted.is_ok_and(|hinted| hinted > before / 2 && hinted < before));
        assert!(free() < before / 2);

        device.change(HINT_ID, HINT_DONE);
        assert_eq!(is_free_again(before), Ok(()));
    }

    #[test]
    fn hints_do_not_raise_watermarks() -> Result {
        let device = device()?;
        let between = halve_page_blocks()?;
        memory::boost(0);

        device.change(HINT_ID, 2);
        round(&device, 2)?;
        assert_eq!(memory::boosted_pages(), 0);

        drop(between);
        Ok(())
    }

    #[test]
    fn draining_the_lists_does_not_raise_watermarks() -> Result {
        let kept = halve_unmovable()?;
        memory::boost(0);

        drain::drain_free_lists();
        assert_eq!(memory::boosted_pages(), 0);

        drop(kept);
        Ok(())
    }

    #[test]
    fn adjacent_blocks_are_one_hint_and_all_hints_one_notification() -> Result {
        let device = device()?;
        let (mut longest, mut hints) = (0, 0);

        device.change(HINT_ID, 2);
        eventually(|| Ok(device.kicks(HINTS) > 0))?;
        // The device uses no hint.
        fsleep(Delta::from_millis(20));
        while let Some(request) = device.next(HINTS)? {
            longest = longest.max(request.writable);
            hints += 1;
        }
        assert!(hints > 1);
        assert!(longest > PAGE_SIZE << MAX_ORDER);
        assert_eq!(device.kicks(HINTS), 1);
        Ok(())
    }

    #[test]
    fn short_lists_are_not_drained_for_hints() -> Result {
        let device = device()?;
        eventually(|| {
            drain::drain_free_lists();
            Ok(!drain::has_long_lists())
        })?;
        let drains = drain::DRAINS.load(Relaxed);

        device.change(HINT_ID, 2);
        round(&device, 2)?;
        assert_eq!(drain::DRAINS.load(Relaxed), drains);
        Ok(())
    }

    #[test]
    fn an_id_is_answered_once() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(HINT_ID, 7);
        assert!(round(&device, 7).is_ok());
        device.change(HINT_ID, 7);
        fsleep(Delta::from_millis(20));
        assert!(device.next(HINTS).is_ok_and(|next| next.is_none()));

        // It is not hinted either when the host has stopped in between.
        device.change(HINT_ID, HINT_STOP);
        device.change(HINT_ID, 8);
        assert!(round(&device, 8).is_ok());
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn an_id_of_before_a_suspend_is_a_new_one() -> Result {
        let device = device()?;

        device.change(HINT_ID, 7);
        round(&device, 7)?;
        device.freeze()?;
        device.restore(QUEUE_SIZE)?;
        assert!(round(&device, 7).is_ok_and(|hinted| hinted > 0));
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_block_of_hints_is_online_again_without_a_restore() {
        if has_none() {
            return;
        }
        let hint = || {
            let device = device()?;

            device.change(HINT_ID, 7);
            let (request, _) = next(&device)?;
            answer(&device, &request)?;
            Ok(device)
        };
        assert_eq!(is_online_without_restore(hint), Ok(true));
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_queue_of_one_entry_gets_all_hints() -> Result {
        let device = device()?;
        let before = free();

        for size in [1, 2] {
            device.freeze()?;
            device.restore(size)?;
            device.change(HINT_ID, 2);
            assert!(round(&device, 2).is_ok_and(|hinted| hinted > before / 2));
            device.change(HINT_ID, HINT_DONE);
            is_free_again(before)?;
        }
        Ok(())
    }

    #[test]
    fn the_id_is_read_once_for_each_change() -> Result {
        let device = device()?;
        // The target may have changed as well.
        let reads = |changes: u32| eventually(|| Ok(device.accesses().0 == 2 * changes));
        // At its beginning the driver reads both.
        reads(1)?;

        device.change(HINT_ID, 2);
        round(&device, 2)?;
        reads(2)?;
        fsleep(Delta::from_millis(20));
        assert_eq!(device.accesses().0, 4);
        Ok(())
    }

    #[test]
    fn a_round_ends_with_more_ranges_than_there_is_room_for() -> Result {
        const MAX_RANGES: usize = RANGES_PER_ENTRY * QUEUE_SIZE as usize;
        let smallest = (PAGE_SIZE as u64) << min_order();
        if Info::now().free < 5 * MAX_RANGES as u64 * smallest / 2 {
            // With such large pageblocks there cannot be that many ranges.
            return Ok(());
        }
        let device = device()?;
        let (between, ranges) = cut_up()?;
        assert!(ranges > MAX_RANGES + MAX_RANGES / 8);

        device.change(HINT_ID, 2);
        let hinted = round(&device, 2)?;
        assert!(hinted > MAX_RANGES as u64 * smallest);

        drop(between);
        Ok(())
    }

    #[test]
    fn hinted_memory_is_hinted_again_above_the_reserve() -> Result {
        // A process leaves less than the reserve, and gets the hints that the device has used.
        const LEFT: u64 = 24 * MIB;
        const SMALL: u32 = 18 - PAGE_SHIFT as u32;
        // A watermark boost, up to a pageblock, is ignored here.
        let available = || Info::now().available;
        let device = device()?;
        let mut taken = KVVec::new();

        device.change(HINT_ID, 2);
        round(&device, 2)?;
        eventually(|| {
            while available() > LEFT {
                let Some(range) = BlockRange::alloc(None, SMALL) else {
                    memory::boost(0);
                    return Ok(false);
                };
                taken.push(range, GFP_KERNEL)?;
            }
            Ok(true)
        })?;

        device.change(HINT_ID, 3);
        round(&device, 3)?;
        assert!(available() > LEFT);
        Ok(())
    }

    #[test]
    fn a_new_id_ends_the_round() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(HINT_ID, 2);
        let first = next(&device);
        assert!(first.is_ok());
        let Ok((first, message)) = first else { return };
        assert_eq!(message, Message::Id(2));

        // Messages in flight come first, then the end of the old round, then the new one.
        device.change(HINT_ID, 3);
        assert_eq!(answer(&device, &first), Ok(()));
        loop {
            let this = next(&device);
            assert!(this.is_ok());
            let Ok((request, message)) = this else { return };

            assert_eq!(answer(&device, &request), Ok(()));
            if message == Message::Id(HINT_STOP) {
                break;
            }
            assert!(matches!(message, Message::Memory(_)));
        }
        assert!(round(&device, 3).is_ok());
    }

    #[test]
    fn hints_that_the_device_has_not_used_are_not_freed() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };
        let before = free();

        device.change(HINT_ID, 2);
        let id = next(&device);
        let memory = next(&device);
        assert!(id.is_ok() && memory.is_ok());
        let (Ok(_), Ok((request, Message::Memory(bytes)))) = (id, memory) else {
            return;
        };

        device.change(HINT_ID, HINT_DONE);
        fsleep(Delta::from_millis(50));
        assert!(free() + bytes as u64 <= before + 8 * MIB);

        assert_eq!(answer(&device, &request), Ok(()));
    }

    #[test]
    fn a_broken_queue_keeps_no_memory() {
        let device = device();
        assert!(device.is_ok());
        let Ok(device) = device else { return };
        let before = free();

        device.change(HINT_ID, 2);
        assert!(round(&device, 2).is_ok());
        assert!(free() < before / 2);

        assert_eq!(device.answer_raw(HINTS, u32::MAX, 0), Ok(()));
        assert_eq!(device.interrupt(HINTS), Ok(()));
        assert_eq!(is_free_again(before), Ok(()));

        // No more memory is allocated for it either.
        device.change(HINT_ID, 3);
        fsleep(Delta::from_millis(50));
        assert_eq!(is_free_again(before), Ok(()));
    }

    #[test]
    fn all_comes_back_from_a_device_that_does_not_answer() {
        let before = free();
        {
            let device = device();
            assert!(device.is_ok());
            let Ok(device) = device else { return };

            device.change(HINT_ID, 2);
            assert!(next(&device).is_ok() && next(&device).is_ok());
            assert!(free() < before / 2);
        }
        assert_eq!(is_free_again(before), Ok(()));
    }
}
