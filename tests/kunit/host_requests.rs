// SPDX-License-Identifier: GPL-2.0

//! Requests of a device in the kernel, and the driver's answers.

#[cfg(CONFIG_PM_SLEEP)]
use super::memory_blocks::is_online_without_restore;
use super::{
    device::{
        eventually,
        free,
        BASE, //
    },
    memory_blocks::{
        blocks,
        has_none, //
    }, //
};

use crate::{
    features::requests::work,
    rust::{
        fs::caches::CacheDropper,
        mm::{
            contig::{
                contig_pages,
                drain, //
            },
            hotplug::online,
            info::Info,
            memory::{
                self,
                Pretence, //
            },
            pages::page::pageblock_order, //
        },
        notifiers::shrinker::{
            Shrink,
            Shrinker, //
        },
        this_module,
        virtio::{
            fake_device::{
                FakeDevice,
                Request, //
            },
            FeatureBit, //
        },
        virtio_balloon::{
            request,
            F_HOST_REQUESTS,
            F_STATS_VQ,
            NUM_PAGES, //
        }, //
    },
    sources::memory_blocks, //
};

use core::mem;
use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The request queue of a device without statistics, hints and reports.
const REQUESTS: usize = 2;

/// A device that makes requests.
struct Host {
    device: FakeDevice,
    /// Buffers for requests.
    request_buffers: KVec<Request>,
    /// Messages of the driver that the device has not used yet, in order.
    messages: KVec<Request>,
}

/// A message of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// The command, the id, and the number of pages.
    Pages(u16, u64, u64),
    /// The id and the status.
    Completion(u64, u8),
}

/// A cache that frees nothing before it is allowed to.
struct SlowCache {
    /// How often it was asked to free objects, and how often it has done so.
    asked: Atomic<u32>,
    done: Atomic<u32>,
    may_end: Atomic<bool>,
}

impl Shrink for SlowCache {
    fn count(&self) -> usize {
        1
    }

    fn scan(&self, _wanted: usize) -> usize {
        self.asked.add(1, Relaxed);
        // A failed test ends as well.
        for _ in 0..6_000 {
            if self.may_end.load(Relaxed) {
                break;
            }
            fsleep(Delta::from_millis(10));
        }
        self.done.add(1, Relaxed);
        // So many objects that the kernel asks ten times or more.
        1 << 10
    }
}

/// Drops caches for a request, and calls `leave` before that ends.
fn leave_while_dropping(leave: impl FnOnce(Host) -> Result) -> Result {
    let cache = Arc::new(
        SlowCache {
            asked: Atomic::new(0),
            done: Atomic::new(0),
            may_end: Atomic::new(false),
        },
        GFP_KERNEL,
    )?;
    let _shrinker = Shrinker::new(cache.clone(), c"virtio_balloon_rs_slow_cache")?;
    let mut host = Host::new()?;
    let references = this_module::references();

    host.ask(request::DROP_CACHES, 0, request::CACHES_SLAB, 1, 0)?;
    eventually(|| Ok(cache.asked.load(Relaxed) > 0))?;
    leave(host)?;

    let is_left_behind = cache.done.load(Relaxed) == 0
        && CacheDropper::begin().is_none()
        && this_module::references() > references;
    cache.may_end.store(true, Relaxed);
    eventually(|| Ok(this_module::references() == references))?;

    // The signal has ended it.
    let is_killed = cache.asked.load(Relaxed) <= 2 && CacheDropper::begin().is_some();
    (is_left_behind && is_killed).then_some(()).ok_or(EINVAL)
}

/// While the kernel migrates pages for a discard, removes the device, drains the per-CPU page
/// lists, and removes another device whose driver waits to take memory blocks. Returns whether the
/// thread of the discard was left behind, and has ended with the migration.
fn leave_while_migrating() -> Result<bool> {
    let references = this_module::references();
    let waits = Pretence::migration_waits();
    let waiting = contig_pages::WAITING.load(Relaxed);
    let mut host = Host::new()?;

    host.ask(request::UNUSED_DISCARD, 21, 0, 3, 0)?;
    eventually(|| Ok(contig_pages::WAITING.load(Relaxed) > waiting))?;
    drop(host);
    drain::drain_free_lists();
    if !has_none() {
        let zeroing = Pretence::zeroes_on_allocation();
        let other = FakeDevice::new(&BASE)?;

        drop(zeroing);
        other.change(NUM_PAGES, u32::MAX);
        eventually(|| Ok(online::HOTPLUG_GUARDS.load(Relaxed) > 0))?;
    }
    let is_left_behind = this_module::references() > references;
    drop(waits);
    eventually(|| Ok(this_module::references() == references))?;
    Ok(is_left_behind)
}

/// While the kernel migrates pages for a discard, cancels it and begins four others, one after
/// the other. Returns how many threads were started meanwhile, and the status of the fourth one
/// when the migration has ended.
fn cancel_while_migrating() -> Result<(usize, u8)> {
    let references = this_module::references();
    let waits = Pretence::migration_waits();
    let waiting = contig_pages::WAITING.load(Relaxed);
    let mut host = Host::new()?;

    host.ask(request::UNUSED_DISCARD, 21, 0, 1, 0)?;
    eventually(|| Ok(contig_pages::WAITING.load(Relaxed) > waiting))?;
    let before = work::ALLOCATIONS.load(Relaxed);
    for id in 1..5 {
        host.ask(request::CANCEL, 0, 0, id + 100, id)?;
        for _ in 0..2 {
            while !matches!(host.answer()?, Message::Completion(..)) {}
        }
        host.ask(request::UNUSED_DISCARD, 21, 0, id + 1, 0)?;
        fsleep(Delta::from_millis(20));
    }
    let threads = work::ALLOCATIONS.load(Relaxed) - before;

    drop(waits);
    let (status, _) = host.answers(request::UNUSED_DISCARD, 5)?;
    drop(host);
    eventually(|| Ok(this_module::references() == references))?;
    Ok((threads, status))
}

/// Cancels a discard of all memory when the device has two messages, and the last block is ready.
/// Returns whether all memory blocks are free afterwards.
///
/// # Errors
///
/// `ENOENT` if there are not enough blocks.
fn cancel_when_blocks_end() -> Result<bool> {
    let _zeroing = Pretence::zeroes_on_allocation();
    drain::drain_free_lists();
    let before = blocks().count();
    if before < 4 {
        return Err(ENOENT);
    }
    let mut host = Host::new()?;
    let ends = memory_blocks::ENDS.load(Relaxed);

    host.ask(request::UNUSED_DISCARD, 21, 0, 3, 0)?;
    let (mut first, mut second) = (host.message()?, host.message()?);
    loop {
        // Long enough for another block.
        fsleep(Delta::from_millis(200));
        if memory_blocks::ENDS.load(Relaxed) > ends {
            break;
        }
        host.use_message(&first)?;
        first = mem::replace(&mut second, host.message()?);
    }

    host.ask(request::CANCEL, 0, 0, 4, 3)?;
    host.use_message(&first)?;
    host.use_message(&second)?;
    for _ in 0..2 {
        while !matches!(host.answer()?, Message::Completion(..)) {}
    }
    let all_are_free = eventually(|| {
        drain::drain_free_lists();
        Ok(blocks().count() >= before)
    });
    Ok(all_are_free.is_ok())
}

/// Returns whether caches can be dropped: with a built-in driver /proc is not mounted yet.
pub(super) fn can_drop_caches() -> bool {
    let dropping = CacheDropper::begin();

    dropping.is_some_and(|dropping| dropping.drop_caches(true, true) != Err(ENOENT))
}

/// Returns the 64-bit number at `words`.
fn long(words: &[u16]) -> u64 {
    words.iter().take(4).rev().fold(0, |number, &word| {
        number << 16 | u64::from(u16::from_le(word))
    })
}

impl Message {
    fn read(request: &Request) -> Result<Self> {
        let words = &request.words;
        let command = u16::from_le(*words.first().ok_or(EINVAL)?);
        let id = long(words.get(4..).ok_or(EINVAL)?);

        match command {
            request::COMPLETION if words.len() == 8 => {
                let status = words.get(1).ok_or(EINVAL)?.to_ne_bytes();
                Ok(Self::Completion(id, status[0]))
            }
            request::UNUSED_SKIP | request::UNUSED_DISCARD => Ok(Self::Pages(
                command,
                id,
                long(words.get(12..).ok_or(EINVAL)?),
            )),
            _ => Err(EINVAL),
        }
    }
}

impl Host {
    fn new() -> Result<Self> {
        Self::with(&[FeatureBit::VERSION_1, F_HOST_REQUESTS])
    }

    fn with(features: &[FeatureBit]) -> Result<Self> {
        Ok(Self {
            device: FakeDevice::new(features)?,
            request_buffers: KVec::new(),
            messages: KVec::new(),
        })
    }

    /// Takes the driver's messages.
    fn collect(&mut self) -> Result {
        while let Some(request) = self.device.next(REQUESTS)? {
            let list = match request.writable {
                0 => &mut self.messages,
                _ => &mut self.request_buffers,
            };
            list.push(request, GFP_KERNEL)?;
        }

        Ok(())
    }

    /// Takes a buffer for a request.
    fn inbox(&mut self) -> Result<Request> {
        eventually(|| {
            self.collect()?;
            Ok(!self.request_buffers.is_empty())
        })?;

        self.request_buffers.pop().ok_or(EINVAL)
    }

    /// Takes the next message, without using it.
    fn message(&mut self) -> Result<Request> {
        eventually(|| {
            self.collect()?;
            Ok(!self.messages.is_empty())
        })?;

        self.messages.remove(0).map_err(|_| EINVAL)
    }

    /// Makes a request.
    fn ask(&mut self, command: u16, block_shift: u8, caches: u32, id: u64, start: u64) -> Result {
        let inbox = self.inbox()?;
        let mut words = KVec::with_capacity(16, GFP_KERNEL)?;
        words.push(command.to_le(), GFP_KERNEL)?;
        words.push(u16::from(block_shift).to_le(), GFP_KERNEL)?;
        for number in [u64::from(caches) << 32, id, start, 0] {
            let skip = if words.len() == 2 { 2 } else { 0 };
            for shift in [0, 16, 32, 48].into_iter().skip(skip) {
                words.push(((number >> shift) as u16).to_le(), GFP_KERNEL)?;
            }
        }
        self.device.fill(REQUESTS, &inbox, &words)?;
        self.device.interrupt(REQUESTS)
    }

    /// Uses a message.
    fn use_message(&self, message: &Request) -> Result {
        self.device.answer(REQUESTS, message, 0)?;
        self.device.interrupt(REQUESTS)
    }

    /// Takes the next message, and uses it.
    fn answer(&mut self) -> Result<Message> {
        let message = self.message()?;
        self.use_message(&message)?;
        Message::read(&message)
    }

    /// Takes all messages up to a completion. Returns the status, and the number of pages.
    ///
    /// # Errors
    ///
    /// `EINVAL` if one has another id or another command.
    fn answers(&mut self, command: u16, id: u64) -> Result<(u8, u64)> {
        let mut pages = 0;

        loop {
            match self.answer()? {
                Message::Pages(this, of, count) if this == command && of == id => pages += count,
                Message::Completion(of, status) if of == id => return Ok((status, pages)),
                _ => return Err(EINVAL),
            }
        }
    }
}

#[kunit_tests(virtio_balloon_rs_requests)]
mod tests {
    use super::*;

    #[test]
    fn unused_pages_are_listed_with_the_id_of_the_request() {
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        for id in [1, 2, u64::MAX] {
            assert_eq!(host.ask(request::UNUSED_SKIP, 12, 0, id, 0), Ok(()));
            if memory::free_page_value().is_some() {
                let answer = host.answers(request::UNUSED_SKIP, id);
                assert_eq!(answer, Ok((request::ABORTED, 0)));
                continue;
            }
            let free = Info::now().free >> PAGE_SHIFT;
            let answer = host.answers(request::UNUSED_SKIP, id);
            assert!(answer.is_ok_and(|(status, pages)| {
                status == request::COMPLETE && pages > free / 10 * 9 && pages < free / 10 * 11
            }));
        }
    }

    #[test]
    fn pages_to_be_discarded_are_kept_until_the_device_has_used_the_message() {
        const NOISE: u64 = 4 << 20;
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };
        let before = free();

        assert_eq!(host.ask(request::UNUSED_DISCARD, 21, 0, 7, 0), Ok(()));
        if memory::free_page_value().is_some() {
            let answer = host.answers(request::UNUSED_DISCARD, 7);
            assert_eq!(answer, Ok((request::ABORTED, 0)));
            return;
        }

        let first = host.message();
        assert!(first.is_ok());
        let Ok(first) = first else { return };
        fsleep(Delta::from_millis(100));
        let held = before.saturating_sub(free());
        // The memory of four messages, each with 64 MiB or a pageblock.
        let block = (PAGE_SIZE as u64) << pageblock_order();
        assert!(held > NOISE && held < 4 * block.max(64 << 20) + NOISE);

        assert_eq!(host.use_message(&first), Ok(()));
        let answer = host.answers(request::UNUSED_DISCARD, 7);
        assert!(answer.is_ok_and(|(status, _)| status == request::COMPLETE));
        assert_eq!(eventually(|| Ok(free() + NOISE > before)), Ok(()));
    }

    #[test]
    fn invalid_requests_are_refused() {
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        for (command, shift, caches, id, status) in [
            (9, 0, 0, 5, request::UNSUPPORTED),
            (0, 0, 0, 5, request::UNSUPPORTED),
            (request::UNUSED_SKIP, 64, 0, 5, request::MALFORMED),
            (request::UNUSED_SKIP, 12, 0, 0, request::MALFORMED),
            (request::DROP_CACHES, 0, 0, 5, request::MALFORMED),
            (request::DROP_CACHES, 0, 4, 5, request::MALFORMED),
            (request::CANCEL, 0, 0, 5, request::UNKNOWN_ID),
        ] {
            assert_eq!(host.ask(command, shift, caches, id, 99), Ok(()));
            assert_eq!(host.answer(), Ok(Message::Completion(id, status)));
        }
    }

    #[test]
    fn a_request_that_is_too_short_is_passed_over() {
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        let inbox = host.inbox();
        assert!(inbox.is_ok());
        let Ok(inbox) = inbox else { return };
        let words = [3, 12, 0, 0, 8].map(u16::to_le);
        assert_eq!(host.device.fill(REQUESTS, &inbox, &words), Ok(()));
        assert_eq!(host.device.interrupt(REQUESTS), Ok(()));

        assert_eq!(host.ask(9, 0, 0, 5, 0), Ok(()));
        assert_eq!(
            host.answer(),
            Ok(Message::Completion(5, request::UNSUPPORTED))
        );
    }

    #[test]
    fn a_request_can_be_called_off() {
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        // More messages than the queue has room for, so that the request is still open.
        assert_eq!(host.ask(request::UNUSED_DISCARD, 21, 0, 3, 0), Ok(()));
        assert_eq!(host.ask(request::CANCEL, 0, 0, 4, 3), Ok(()));

        let (mut cancelled, mut done) = (None, None);
        while done.is_none() || cancelled.is_none() {
            match host.answer() {
                Ok(Message::Pages(request::UNUSED_DISCARD, 3, _)) if done.is_none() => (),
                Ok(Message::Completion(3, status)) => cancelled = Some(status),
                Ok(Message::Completion(4, status)) => done = Some(status),
                other => {
                    assert_eq!(other, Err(EINVAL));
                    return;
                }
            }
        }
        if memory::free_page_value().is_none() {
            assert_eq!(cancelled, Some(request::CANCELLED));
            assert_eq!(done, Some(request::COMPLETE));
        }
    }

    #[test]
    fn a_cancelled_discard_keeps_no_memory_block() {
        if has_none() {
            return;
        }
        assert_eq!(cancel_when_blocks_end(), Ok(true));
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_block_of_a_discard_is_online_again_without_a_restore() {
        if has_none() {
            return;
        }
        let discard = || {
            let mut host = Host::new()?;

            host.ask(request::UNUSED_DISCARD, 21, 0, 3, 0)?;
            Ok(host.device)
        };
        assert_eq!(is_online_without_restore(discard), Ok(true));
    }

    #[test]
    fn caches_are_dropped() {
        let host = Host::new();
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };
        let all = request::CACHES_PAGES | request::CACHES_SLAB;
        let expected = match can_drop_caches() {
            true => request::COMPLETE,
            false => request::ABORTED,
        };

        // One after the other, although they are requested at once. The budget does not allow more.
        for id in 1..5 {
            assert_eq!(host.ask(request::DROP_CACHES, 0, all, id, 0), Ok(()));
        }
        for _ in 1..5 {
            let answer = host.answer();
            assert!(answer.is_ok_and(
                |answer| matches!(answer, Message::Completion(_, status) if status == expected)
            ));
        }
        // Requests without a cost are answered meanwhile.
        assert_eq!(host.ask(request::CANCEL, 0, 0, 5, 99), Ok(()));
        assert_eq!(
            host.answer(),
            Ok(Message::Completion(5, request::UNKNOWN_ID))
        );
    }

    #[test]
    fn a_device_can_be_removed_while_caches_are_being_dropped() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        leave_while_dropping(|host| {
            drop(host);
            Ok(())
        })
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn the_system_can_suspend_while_caches_are_being_dropped() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        leave_while_dropping(|host| host.device.freeze())
    }

    #[test]
    fn a_device_can_be_removed_while_pages_are_migrated_for_a_discard() {
        assert_eq!(leave_while_migrating(), Ok(true));
    }

    #[test]
    fn cancelled_discards_leave_one_thread() {
        if memory::free_page_value().is_some() {
            return;
        }
        assert_eq!(cancel_while_migrating(), Ok((0, request::COMPLETE)));
    }

    #[test]
    fn dropping_caches_can_be_called_off() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        leave_while_dropping(|mut host| {
            host.ask(request::CANCEL, 0, 0, 2, 1)?;
            for _ in 0..2 {
                match host.answer()? {
                    Message::Completion(1, request::CANCELLED) => (),
                    Message::Completion(2, request::COMPLETE) => (),
                    _ => return Err(EINVAL),
                }
            }
            Ok(())
        })
    }

    #[test]
    fn a_device_that_does_not_take_answers_can_be_removed() {
        const NOISE: u64 = 4 << 20;
        let before = free();

        {
            let host = Host::new();
            assert!(host.is_ok());
            let Ok(mut host) = host else { return };

            for id in 1..6 {
                assert_eq!(host.ask(request::UNUSED_DISCARD, 21, 0, id, 0), Ok(()));
            }
            fsleep(Delta::from_millis(100));
        }
        assert!(free() + NOISE > before);
    }

    #[test]
    fn the_queue_comes_after_the_others() {
        let host = Host::with(&[FeatureBit::VERSION_1, F_STATS_VQ, F_HOST_REQUESTS]);
        assert!(host.is_ok());
        let Ok(host) = host else { return };

        assert_eq!(eventually(|| Ok(host.device.next(3)?.is_some())), Ok(()));
    }
}
