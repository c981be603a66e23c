// SPDX-License-Identifier: GPL-2.0

//! Memory blocks: when one can be taken, and when not.

#![forbid(unsafe_code)]

use super::device::{
    eventually,
    serve,
    Host,
    BASE,
    DEFLATE,
    INFLATE, //
};
use crate::{
    balloon::state::Balloon,
    device::{
        announced,
        timeouts, //
    },
    messages::{
        balloon_page::{
            balloon_pfns,
            BALLOON_PAGES_PER_PAGE, //
        },
        negotiated::Negotiated, //
    },
    rust::{
        fs::file,
        mm::{
            contig::{
                contig_pages::ContigPages,
                drain, //
            },
            hotplug::{
                exclusion::{
                    self,
                    CallbackTurn, //
                },
                memory_block::{
                    Limits,
                    MemoryBlock,
                    OfflineBlock,
                    Outcome, //
                },
                online::{
                    self,
                    HotplugGuard, //
                }, //
            },
            info::Info,
            memory::{
                self,
                Pretence, //
            },
            pages::{
                page::pageblock_order,
                page_list::PageList, //
            },
            pfn_range::PfnRange, //
        },
        notifiers::oom::last::out_of_memory,
        virtio::{
            fake_device::FakeDevice,
            FeatureBit, //
        },
        virtio_balloon::{
            ACTUAL,
            F_DEFLATE_ON_OOM,
            NUM_PAGES, //
        },
        work::{
            task::{
                new_slot,
                Slot,
                TaskQueue, //
            },
            thread::Thread, //
        }, //
    },
    sources::{
        candidates::Candidates,
        memory_blocks, //
    }, //
};

use kernel::{
    error::code::ERESTARTNOINTR,
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// How long the kernel may try. It takes longer where the test gets no processor for a while.
const LIMITS: Limits = Limits {
    offline: 60_000,
    online: timeouts::ONLINE,
    busy: timeouts::HOTPLUG_BUSY,
};

/// The maximum number of blocks of the guest.
const BLOCKS: u64 = 64;

/// Returns the blocks that could be taken now. On arm64 the kernel refuses to take boot memory
/// offline.
pub(super) fn blocks() -> impl Iterator<Item = MemoryBlock> {
    let pages = MemoryBlock::pages();

    (0..BLOCKS)
        .filter_map(move |number| MemoryBlock::of(number * pages, pages))
        .filter(|block| block.can_be_taken())
}

/// Returns whether no block can be taken in any guest with this kernel. Tests of a driver that is
/// built in run before /sys is mounted.
pub(super) fn has_none() -> bool {
    MemoryBlock::pages() == 0 || cfg!(CONFIG_ARM64) || !cfg!(MODULE)
}

/// Returns the size of a block in bytes.
fn block_bytes() -> u64 {
    MemoryBlock::pages() << PAGE_SHIFT
}

/// Takes a block, so that no other code has it.
fn take() -> Result<PageList> {
    let taken = blocks().find_map(|block| match block.take(LIMITS, || true) {
        Outcome::Pages(pages) => Some(pages),
        _ => None,
    });

    taken.ok_or(ENOENT)
}

/// Uses all messages until the balloon has not grown for `time`.
fn grow_until_stuck(host: &mut Host, time: Delta) -> Result {
    let mut last = (host.device.field(ACTUAL), Instant::<Monotonic>::now());

    while last.1.elapsed() < time {
        serve(&host.device, INFLATE, &mut host.inflated)?;
        let now = host.device.field(ACTUAL);
        if now != last.0 {
            last = (now, Instant::now());
        }
        fsleep(Delta::from_millis(1));
    }
    Ok(())
}

/// Finds candidates below the page frame number `end`, with `holds` at a time. Returns them in the
/// order in which they are taken, and the number of steps.
fn find(end: u64, holds: usize) -> Result<(KVec<MemoryBlock>, usize)> {
    let mut candidates = Candidates::new(end)?;
    let (mut found, mut looks) = (KVec::new(), 1);

    while candidates.search(holds)? {
        looks += 1;
    }
    while let Some(block) = candidates.pop(|_| Some(0)) {
        found.push(block, GFP_KERNEL)?;
    }
    Ok((found, looks))
}

/// Asks for all memory while the caller has the guard for taking blocks, and returns when the
/// driver waits for it.
fn wait_for_guard(host: &Host) -> Result {
    // Per-CPU lists may have so much of what the test before has freed that no block looks free.
    drain::drain_free_lists();
    host.device.change(NUM_PAGES, u32::MAX);
    eventually(|| Ok(online::HOTPLUG_GUARDS.load(Relaxed) == 2))
}

/// How many times a test tries that needs blocks from the driver. The driver gives up a block that
/// takes too long, as in a guest with hardly any processor time.
const TRIES: usize = 10;

/// Plugs a virtio-mem device when the driver is about to take the first block. Returns how many
/// blocks it takes.
///
/// # Errors
///
/// `ENOENT` if there are not enough.
fn taken_with_virtio_mem() -> Result<usize> {
    let _zeroing = Pretence::zeroes_on_allocation();
    let before = blocks().count();
    if before < 3 {
        return Err(ENOENT);
    }
    let host = Host::new(&BASE)?;
    let guard = HotplugGuard::begin()?;

    wait_for_guard(&host)?;
    let _virtio_mem = FakeDevice::virtio_mem()?;
    drop(guard);
    eventually(|| Ok(online::HOTPLUG_GUARDS.load(Relaxed) == 0))?;
    // It would take the next one now.
    fsleep(Delta::from_millis(500));
    Ok(before - blocks().count())
}

/// Breaks a queue when blocks are ready that the device has no room for.
///
/// # Errors
///
/// `ETIMEDOUT` if the guest does not get the blocks back.
fn break_queue() -> Result {
    let _zeroing = Pretence::zeroes_on_allocation();
    let host = Host::new(&BASE)?;
    let before = Info::now().free;

    host.device.change(NUM_PAGES, u32::MAX);
    eventually(|| Ok(Info::now().free + block_bytes() < before))?;
    host.device.answer_raw(DEFLATE, u32::MAX, 0)?;
    host.device.interrupt(DEFLATE)?;
    // The pages in flight are much less than a block.
    eventually(|| Ok(Info::now().free + block_bytes() / 2 > before))?;
    fsleep(Delta::from_millis(500));
    eventually(|| Ok(Info::now().free + block_bytes() / 2 > before))
}

/// Frees two blocks during the pause of a balloon that cannot grow. Returns whether the balloon has
/// both before the pause ends, and how many times the per-CPU page lists were drained until then.
fn grow_in_pause() -> Result<(bool, usize)> {
    /// The pauses end 0.2, 0.6, 1.4, 3.0, 6.2 and 12.6 seconds after the first failure.
    const IN_THE_SIXTH: Delta = Delta::from_millis(7_000);
    /// The device's turns until shortly before its end, if each takes hardly longer than its sleep.
    /// With a busy host the pause may end before that.
    const TURNS: u32 = 4_000;
    let _zeroing = Pretence::zeroes_on_allocation();
    let come_back = [take()?, take()?];
    let mut host = Host::new(&BASE)?;

    host.device.change(NUM_PAGES, u32::MAX);
    grow_until_stuck(&mut host, IN_THE_SIXTH)?;
    // The guest itself needs some memory.
    let pages = MemoryBlock::pages() as u32 / 4 * 7 * BALLOON_PAGES_PER_PAGE as u32;
    let (wanted, drains) = (
        host.device.field(ACTUAL) + pages,
        drain::DRAINS.load(Relaxed),
    );
    drop(come_back);
    for _ in 0..TURNS {
        if host.device.field(ACTUAL) >= wanted {
            break;
        }
        serve(&host.device, INFLATE, &mut host.inflated)?;
        fsleep(Delta::from_millis(1));
    }

    let has_both = host.device.field(ACTUAL) >= wanted;
    Ok((has_both, drain::DRAINS.load(Relaxed) - drains))
}

/// Runs out of memory while the driver takes a block for an empty balloon. Returns how many pages
/// it says come back, and whether the balloon stays empty then.
fn give_back_while_taking() -> Result<(usize, bool)> {
    static IS_HELD: Atomic<bool> = Atomic::new(false);
    let _zeroing = Pretence::zeroes_on_allocation();
    let host = Host::new(&[FeatureBit::VERSION_1, F_DEFLATE_ON_OOM])?;

    // Another thread keeps the driver from being done with its first block, until this one waits
    // for that.
    let tasks = TaskQueue::new(c"virtio_balloon_rs_kunit-blocks")?;
    let slot: Slot<Balloon> = new_slot!(c"virtio_balloon_rs_kunit", tasks)?;
    let _other = Thread::start(c"balloon_rs_kunit", Some(slot.waker()), || {
        let waits = memory_blocks::WAITS.load(Relaxed);
        let guard = HotplugGuard::begin()?;

        IS_HELD.store(true, Relaxed);
        let result = eventually(|| Ok(memory_blocks::WAITS.load(Relaxed) > waits));
        drop(guard);
        result
    })?;
    eventually(|| Ok(IS_HELD.load(Relaxed)))?;
    wait_for_guard(&host)?;

    // A guest with hardly any processor time needs longer than the driver waits, and runs out of
    // memory again.
    let given = (0..10).map(|_| out_of_memory()).find(|&pages| pages > 0);
    fsleep(Delta::from_millis(500));
    let is_empty = host.device.next(INFLATE)?.is_none();
    Ok((given.unwrap_or(0), is_empty))
}

/// Inflates by three blocks. Returns where the balloon's pages from the first candidate begin and
/// end, in the order in which the device got the pages, and the number of all pages.
fn inflate_by_three() -> Result<(usize, usize, usize)> {
    let _zeroing = Pretence::zeroes_on_allocation();
    drain::drain_free_lists();
    let (found, _) = find(u64::MAX, usize::MAX)?;
    let first = found.iter().find(|block| block.can_be_taken());
    let first = first.ok_or(ENOENT)?.pfns();
    let mut host = Host::new(&BASE)?;
    let pages = (3 * MemoryBlock::pages()) as u32 * BALLOON_PAGES_PER_PAGE as u32;

    host.resize(pages, pages)?;
    let is_of_first = |&pfn: &u32| first.contains(u64::from(pfn) / BALLOON_PAGES_PER_PAGE as u64);
    let begin = host.inflated.iter().position(is_of_first).ok_or(ENOENT)?;
    let end = host.inflated.iter().rposition(is_of_first).ok_or(ENOENT)?;
    Ok((begin, end, host.inflated.len()))
}

/// Suspends the system when the device of `begin` has made the driver take a block, and the block
/// stays offline. Returns whether it is online again although the device is not restored.
#[cfg(CONFIG_PM_SLEEP)]
pub(super) fn is_online_without_restore(
    begin: impl FnOnce() -> Result<FakeDevice>,
) -> Result<bool> {
    /// The kernel creates no queue of so many entries.
    const NO_QUEUE: u32 = 3;
    let _zeroing = Pretence::zeroes_on_allocation();
    drain::drain_free_lists();
    let online = memory::total_pages();
    let without_block = online - MemoryBlock::pages() as usize;

    let stays_offline = Pretence::stays_offline();
    let device = begin()?;
    eventually(|| Ok(memory::total_pages() <= without_block))?;
    device.freeze()?;
    // The driver has returned all other memory.
    let is_offline = memory::total_pages() <= without_block;
    let is_restored = device.restore(NO_QUEUE).is_ok();
    drop(stays_offline);
    if !is_offline || is_restored {
        return Err(EINVAL);
    }
    // A block of an earlier test may have come online meanwhile.
    Ok(eventually(|| Ok(memory::total_pages() >= online)).is_ok())
}

#[kunit_tests(virtio_balloon_rs_memory_blocks)]
mod tests {
    use super::*;

    #[test]
    fn no_memory_is_isolated_while_a_block_is_taken() -> Result {
        if has_none() {
            return Ok(());
        }
        let range = || {
            // Other tasks may isolate memory for a moment.
            (0..10).any(|_| {
                blocks().any(|block| {
                    let len = 1 << pageblock_order();
                    let first = PfnRange::new(block.pfns().first(), len);
                    first.is_some_and(|pfns| ContigPages::new(pfns).is_ok())
                })
            })
        };

        // A failed assertion would not release the guard.
        let guard = HotplugGuard::begin()?;
        let allocated = range();
        drop(guard);
        assert!(!allocated);
        assert!(range());
        Ok(())
    }

    #[test]
    fn a_block_in_use_stays_online() -> Result {
        /// The balloon pages of 128 MiB.
        const STEP: u32 = 1 << 15;
        /// The part of it that always exists.
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
        // Until the balloon has pages of one of them.
        for steps in 1..=STEPS {
            host.resize(steps * STEP, steps * STEP)?;
            let has = |pfns: PfnRange| {
                host.inflated
                    .iter()
                    .any(|&pfn| pfns.contains(u64::from(pfn) / BALLOON_PAGES_PER_PAGE as u64))
            };
            in_use = takeable.iter().find(|block| has(block.pfns()));
            if in_use.is_some() {
                break;
            }
        }
        assert!(in_use.is_some());

        // The kernel can migrate order-0 pages of the balloon, and would do so with its locks held.
        let taken = in_use.map(|block| block.take(LIMITS, || true));
        assert!(matches!(taken, Some(Outcome::Not(EBUSY))));
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

        let taken = block.take_and_write(&HotplugGuard::begin()?, LIMITS, c"online_movable");
        assert!(matches!(taken, Outcome::Not(EINVAL)));
        block.take_offline(LIMITS)?.bring_online()?;
        assert_eq!(memory::total_pages(), total);

        // Otherwise it is.
        let taken = block.take(LIMITS, || true);
        assert!(
            matches!(&taken, Outcome::Pages(pages) if pages.len() as u64 == MemoryBlock::pages())
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
            let taken = block.take(LIMITS, || true);

            matches!(taken, Outcome::Pages(_)).then(|| file::OPENED.load(Relaxed) - before)
        });
        assert_eq!(opened, Some(1));
    }

    #[test]
    fn candidates_are_looked_for_in_steps() -> Result {
        if has_none() {
            return Ok(());
        }
        let (at_once, looks) = find(u64::MAX, usize::MAX)?;
        assert_eq!(looks, 1);
        assert!(!at_once.is_empty());

        // One hold of a lock at a time finds the same.
        let (in_steps, looks) = find(u64::MAX, 1)?;
        assert!(looks > 1);
        assert_eq!(in_steps.len(), at_once.len());
        assert!(in_steps.iter().all(|block| at_once.contains(block)));
        Ok(())
    }

    #[test]
    fn candidates_have_numbers_in_the_protocol() -> Result {
        let negotiated = |page_sets| Negotiated {
            must_tell_host: false,
            page_sets,
        };
        for page_sets in [false, true] {
            let end = negotiated(page_sets).end();
            assert!(negotiated(page_sets).can_describe(end - 1));
            assert!(!negotiated(page_sets).can_describe(end));
        }
        let end = negotiated(false).end();
        assert!(balloon_pfns(end - 1).is_ok() && balloon_pfns(end).is_err());
        if has_none() {
            return Ok(());
        }

        let (all, _) = find(u64::MAX, usize::MAX)?;
        let last = all.iter().max_by_key(|block| block.pfns().first());
        let last = last.ok_or(ENOENT)?;
        let (below, _) = find(last.pfns().first(), usize::MAX)?;
        assert_eq!(below.len() + 1, all.len());
        assert!(!below.contains(last));
        Ok(())
    }

    #[test]
    fn no_block_is_taken_along_with_a_virtio_mem_device() -> Result {
        if has_none() {
            return Ok(());
        }
        let mut taken = (0..TRIES).map(|_| taken_with_virtio_mem());
        assert_eq!(taken.find(|taken| *taken != Ok(0)), Some(Ok(1)));
        Ok(())
    }

    #[test]
    fn an_oom_waits_for_the_block_that_is_being_taken() -> Result {
        if has_none() {
            return Ok(());
        }
        let (given, is_empty) = give_back_while_taking()?;
        assert!(given > 0);
        assert!(is_empty);
        Ok(())
    }

    #[test]
    fn the_first_block_is_offline_until_the_others_are_taken() -> Result {
        if has_none() {
            return Ok(());
        }
        let mut inflated = (0..TRIES).map(|_| inflate_by_three());
        assert!(inflated.any(|inflated| {
            inflated.is_ok_and(|(begin, end, pages)| begin > 0 && end + 1 == pages)
        }));
        Ok(())
    }

    #[test]
    fn a_block_is_not_kept_while_another_thread_takes_memory_offline() -> Result {
        if has_none() {
            return Ok(());
        }
        let (total, block) = (memory::total_pages(), blocks().next().ok_or(ENOENT)?);

        let offline = block.take_first(LIMITS, || true)?;
        exclusion::begin_offlining()?;
        let rest = block.take_rest(offline);
        exclusion::end_offlining();
        assert!(matches!(rest, Outcome::Not(ERESTARTNOINTR)));
        assert_eq!(memory::total_pages(), total);
        Ok(())
    }

    #[test]
    fn no_other_thread_takes_memory_offline_while_blocks_are_kept() -> Result {
        if has_none() {
            return Ok(());
        }
        // The notifier is the device's.
        let _host = Host::new(&BASE)?;
        let block = blocks().next().ok_or(ENOENT)?;

        let turn = CallbackTurn::begin()?;
        assert_eq!(block.take_offline(LIMITS).err(), Some(EBUSY));
        drop(turn);
        block.take_offline(LIMITS)?.bring_online()
    }

    #[test]
    fn a_block_with_a_memory_error_is_not_retried() -> Result {
        if has_none() || !cfg!(CONFIG_MEMORY_FAILURE) {
            return Ok(());
        }
        // Free blocks come first.
        let (found, _) = find(u64::MAX, usize::MAX)?;
        let block = found.iter().find(|block| block.can_be_taken());
        let block = block.ok_or(ENOENT)?;

        // The error comes after the check, which would find it.
        block.break_first_page()?;
        assert!(!block.can_be_taken());
        assert_eq!(block.take_offline(LIMITS)?.bring_online(), Ok(()));
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_block_of_the_balloon_is_online_again_without_a_restore() {
        if has_none() {
            return;
        }
        let inflate = || {
            let device = FakeDevice::new(&BASE)?;

            device.change(NUM_PAGES, u32::MAX);
            Ok(device)
        };
        assert_eq!(is_online_without_restore(inflate), Ok(true));
    }

    // From here on the tests fill the memory. No block may be free after that: what the kernel
    // allocates meanwhile lies between the pages of the balloon.

    #[test]
    fn a_broken_queue_gives_ready_blocks_back() {
        if has_none() {
            return;
        }
        assert_eq!(break_queue(), Ok(()));
    }

    #[test]
    fn blocks_are_taken_before_a_pause_ends() -> Result {
        if has_none() {
            return Ok(());
        }
        let (has_both, drains) = grow_in_pause()?;
        assert!(has_both);
        // Once before the first block is taken, and once to find it.
        assert!(drains <= 2);
        Ok(())
    }

    #[test]
    fn a_block_of_unplugged_memory_is_forgotten() -> Result {
        if has_none() {
            return Ok(());
        }
        // A file of a device that does not exist any more, as the block does not.
        let host = Host::new(&BASE)?;
        let path = host
            .device
            .path(announced::STOP_REASON.directory, c"floor_mib")?;
        let block = OfflineBlock::of_file(&path, LIMITS)?;
        drop(host);
        assert_eq!(block.bring_online(), Ok(()));
        Ok(())
    }
}
