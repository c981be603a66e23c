// SPDX-License-Identifier: GPL-2.0

//! The whole driver on a device in the kernel, which can violate the protocol.

use crate::{
    balloon::resize::PAGES_PER_RUN,
    device::timeouts,
    features::stats::{
        collect,
        new_buffer, //
    },
    messages::{
        balloon_page::BALLOON_PAGES_PER_PAGE,
        pfns::{
            MESSAGES_IN_FLIGHT,
            MESSAGES_PER_NOTIFICATION, //
        }, //
    },
    rust::{
        mm::{
            contig::drain,
            info::{
                migrated_pages,
                Info, //
            },
            memory::{
                self,
                Pretence, //
            },
            pages::{
                page::{
                    pageblock_order,
                    MAX_ORDER, //
                },
                page_list::PageList, //
            }, //
        },
        notifiers::oom::last::{
            out_of_memory,
            priority, //
        },
        virtio::{
            fake_device::{
                FakeDevice,
                Request,
                QUEUE_SIZE, //
            },
            ByteOrder,
            FeatureBit, //
        },
        virtio_balloon::{
            page_set,
            stat,
            stop_reason,
            ACTUAL,
            F_DEFLATE_ON_OOM,
            F_FREE_PAGE_HINT,
            F_MUST_TELL_HOST,
            F_PAGE_POISON,
            F_PAGE_SETS,
            F_REPORTING,
            F_STATS_VQ,
            F_STATUS,
            F_STOP_REASON,
            NUM_PAGES,
            PFN_SHIFT,
            POISON_VAL,
            STOP_REASON, //
        }, //
    }, //
};

use core::mem;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    rbtree::RBTree,
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

pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;
pub(super) const STATS: usize = 2;

/// The reporting queue of a device without statistics and hints.
const REPORTS: usize = 2;

/// The features of devices with the base protocol, and with page sets.
pub(super) const BASE: [FeatureBit; 1] = [FeatureBit::VERSION_1];
const PAGE_SETS: [FeatureBit; 2] = [FeatureBit::VERSION_1, F_PAGE_SETS];

/// The maximum number of balloon pages in a message of the base protocol.
const MESSAGE: u32 = 256;

/// More balloon pages than the messages in flight can list.
const MANY: u32 = (QUEUE_SIZE + 4) * MESSAGE;

/// How many balloon pages there are in the largest block.
const BLOCK: u32 = (BALLOON_PAGES_PER_PAGE as u32) << MAX_ORDER;

/// How many of the largest blocks the driver sends together, limited to a number that shows that it
/// does.
const BLOCKS: u32 = if PAGES_PER_RUN >> MAX_ORDER < 8 {
    (PAGES_PER_RUN >> MAX_ORDER) as u32
} else {
    8
};

/// Waits until `condition` holds.
pub(super) fn eventually(mut condition: impl FnMut() -> Result<bool>) -> Result {
    // So many that a task that gets no processor for seconds is in time.
    for _ in 0..60_000 {
        if condition()? {
            return Ok(());
        }
        fsleep(Delta::from_millis(1));
    }

    Err(ETIMEDOUT)
}

/// Waits for the driver's next message on `queue`.
pub(super) fn message(device: &FakeDevice, queue: usize) -> Result<Request> {
    let mut request = None;

    eventually(|| {
        request = device.next(queue)?;
        Ok(request.is_some())
    })?;
    request.ok_or(EINVAL)
}

/// Returns the free memory in bytes, per-CPU page lists included: a drain leaves a pageblock there.
pub(super) fn free() -> u64 {
    drain::drain_free_lists();
    Info::now().free + ((memory::pcp_pages() as u64) << PAGE_SHIFT)
}

/// Waits until the driver has set the balloon's size to `size` balloon pages, on a device that uses
/// no buffer.
fn reaches(device: &FakeDevice, size: u32) -> Result {
    eventually(|| Ok(device.field(ACTUAL) == size))
}

/// Returns the page frame numbers in `request`, of balloon pages.
///
/// # Errors
///
/// `EINVAL` if it is a page set that is invalid on this queue.
fn listed_pfns(device: &FakeDevice, queue: usize, request: &Request) -> Result<KVec<u32>> {
    if device.has_feature(F_PAGE_SETS) {
        page_set(queue, request)
    } else {
        request.pfns()
    }
}

/// Reads a page set.
fn page_set(queue: usize, request: &Request) -> Result<KVec<u32>> {
    let mut words = request.words.chunks_exact(4).map(|chunk| {
        chunk
            .iter()
            .rev()
            .fold(0, |word, &part| word << 16 | u64::from(u16::from_le(part)))
    });
    let mut next = || words.next().ok_or(EINVAL);

    let kind = next()? & u64::from(u32::MAX);
    let [id, first, count] = [next()?, next()?, next()?];
    let command = if queue == INFLATE {
        page_set::INFLATE
    } else {
        page_set::DEFLATE
    };
    let kind_of =
        |encoding| u64::from(command) | (PAGE_SHIFT as u64) << 16 | u64::from(encoding) << 24;

    let mut pages = KVec::new();
    if kind == kind_of(page_set::RANGES) && id == 0 && first == 0 {
        while let Ok(range) = next() {
            let first = range >> page_set::COUNT_BITS;
            let len = match range & ((1 << page_set::COUNT_BITS) - 1) {
                0 => next()?,
                len => len,
            };

            for page in first..first + len {
                pages.push(page, GFP_KERNEL)?;
            }
        }
    } else if kind == kind_of(page_set::BITMAP) && id == 0 {
        let mut page = first;

        while let Ok(word) = next() {
            for bit in 0..u64::BITS {
                if word >> bit & 1 != 0 {
                    pages.push(page + u64::from(bit), GFP_KERNEL)?;
                }
            }
            page += u64::from(u64::BITS);
        }
    } else {
        return Err(EINVAL);
    }

    if pages.len() as u64 != count || pages.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(EINVAL);
    }
    let mut pfns = KVec::with_capacity(pages.len() * BALLOON_PAGES_PER_PAGE, GFP_KERNEL)?;
    for page in &pages {
        let first = *page as u32 * BALLOON_PAGES_PER_PAGE as u32;

        for pfn in first..first + BALLOON_PAGES_PER_PAGE as u32 {
            pfns.push(pfn, GFP_KERNEL)?;
        }
    }
    Ok(pfns)
}

/// Takes and uses the messages of a queue, and adds the page frame numbers to `pfns`.
pub(super) fn serve(device: &FakeDevice, queue: usize, pfns: &mut KVec<u32>) -> Result {
    let mut served = false;

    while let Some(request) = device.next(queue)? {
        pfns.extend_from_slice(&listed_pfns(device, queue, &request)?, GFP_KERNEL)?;
        device.answer(queue, &request, 0)?;
        served = true;
    }

    if served {
        device.interrupt(queue)?;
    }
    Ok(())
}

/// A device that records the reported pages.
pub(super) struct Host {
    pub(super) device: FakeDevice,
    pub(super) inflated: KVec<u32>,
    deflated: KVec<u32>,
}

impl Host {
    pub(super) fn new(features: &[FeatureBit]) -> Result<Self> {
        Ok(Self {
            device: FakeDevice::new(features)?,
            inflated: KVec::new(),
            deflated: KVec::new(),
        })
    }

    /// Sets the target and uses all messages until the balloon has the size `size`, both in balloon
    /// pages.
    pub(super) fn resize(&mut self, target: u32, size: u32) -> Result {
        self.device.change(NUM_PAGES, target);
        self.settle(size)
    }

    /// Uses all messages until the balloon has the size `size`, in balloon pages, and all pages
    /// were reported.
    fn settle(&mut self, size: u32) -> Result {
        eventually(|| {
            serve(&self.device, INFLATE, &mut self.inflated)?;
            serve(&self.device, DEFLATE, &mut self.deflated)?;

            Ok(self.device.field(ACTUAL) == size
                && self.inflated.len() - self.deflated.len() == size as usize)
        })
    }
}

/// Compares inflated pages with deflated ones.
///
/// # Errors
///
/// `EINVAL` if a page has the number 0, was inflated twice, or was deflated but not inflated.
fn compare(host: &Host) -> Result {
    let mut pages = RBTree::new();

    for &pfn in &host.inflated {
        if pfn == 0 || pages.try_create_and_insert(pfn, (), GFP_KERNEL)?.is_some() {
            return Err(EINVAL);
        }
    }
    for pfn in &host.deflated {
        pages.remove(pfn).ok_or(EINVAL)?;
    }

    Ok(())
}

/// Inflates and deflates on a device with `features`.
fn cycle(features: &[FeatureBit], pages: u32) -> Result {
    let mut host = Host::new(features)?;
    let size = pages.next_multiple_of(BALLOON_PAGES_PER_PAGE as u32);

    host.resize(pages, size)?;
    compare(&host)?;
    host.resize(0, 0)?;
    compare(&host)
}

/// Sets a target, takes one message from the inflate queue, and passes it to `answer`. Returns how
/// many balloon pages are missing from the guest after the device was removed.
fn misbehave(
    features: &[FeatureBit],
    answer: impl FnOnce(&FakeDevice, &Request) -> Result,
) -> Result<usize> {
    let total = memory::total_pages();

    {
        let device = FakeDevice::new(features)?;

        device.change(NUM_PAGES, 4 * MESSAGE);
        answer(&device, &message(&device, INFLATE)?)?;
        device.interrupt(INFLATE)?;

        // Give the driver time to see it.
        fsleep(Delta::from_millis(20));
    }

    Ok(total - memory::total_pages())
}

/// Inflates to `pages` balloon pages, and deflates while the device uses no buffer, until it has
/// `messages` of the driver. Returns whether the guest has the pages then.
///
/// # Errors
///
/// `ETIMEDOUT` if there are fewer messages, `EINVAL` if there are more, or if the driver reports
/// another size before the device has used them.
fn deflate_unanswered(features: &[FeatureBit], pages: u32, messages: usize) -> Result<bool> {
    let mut host = Host::new(features)?;
    let mut requests = KVec::new();

    host.resize(pages, pages)?;
    let full = free();
    host.device.change(NUM_PAGES, 0);
    // The driver may be slow.
    eventually(|| {
        while let Some(request) = host.device.next(DEFLATE)? {
            requests.push(request, GFP_KERNEL)?;
        }
        Ok(requests.len() >= messages)
    })?;
    let mut is_free = false;
    for _ in 0..20 {
        fsleep(Delta::from_millis(20));
        is_free |= free() > full + (u64::from(pages) << PFN_SHIFT) / 2;
    }
    if host.device.field(ACTUAL) != pages || host.device.next(DEFLATE)?.is_some() {
        return Err(EINVAL);
    }

    for request in &requests {
        let pfns = listed_pfns(&host.device, DEFLATE, request)?;
        host.deflated.extend_from_slice(&pfns, GFP_KERNEL)?;
        host.device.answer(DEFLATE, request, 0)?;
    }

    // All pages must be reported in the end.
    host.device.interrupt(DEFLATE)?;
    host.settle(0)?;
    compare(&host)?;
    Ok(is_free)
}

/// Returns the start of `pages` consecutive kernel pages of the balloon, aligned to that many (page
/// frame numbers of kernel pages).
fn consecutive(host: &Host, pages: usize) -> impl Iterator<Item = usize> + use<'_> {
    let len = pages * BALLOON_PAGES_PER_PAGE;

    // The last pages come from memory that was never in use.
    host.inflated
        .windows(len)
        .rev()
        .filter(move |window| {
            window[0] % len as u32 == 0 && window.windows(2).all(|pair| pair[0] + 1 == pair[1])
        })
        .map(|window| window[0] as usize / BALLOON_PAGES_PER_PAGE)
}

/// Waits until the driver has seen all that the device has done so far, and has acted on it.
fn wait_runs(device: &FakeDevice) -> Result {
    // A run of the driver's task that has begun before may read the target for the first time. The
    // next run sees everything, and has ended when one more run reads the target.
    for _ in 0..3 {
        let (reads, _) = device.accesses();

        device.change(NUM_PAGES, device.field(NUM_PAGES));
        eventually(|| Ok(device.accesses().0 > reads))?;
    }
    Ok(())
}

/// Makes the kernel migrate `pages` consecutive kernel pages of the balloon. Returns their page
/// frame number, the pages, if they are free at once, and the driver's first message about their
/// replacements.
///
/// # Errors
///
/// `ENOENT` if the kernel has migrated none. It does not migrate pages next to unmovable ones.
fn take_out(host: &Host, pages: usize) -> Result<(usize, Result<PageList>, Request)> {
    for first in consecutive(host, pages) {
        let before = migrated_pages();
        let taken = PageList::alloc_range(first, pages);
        if migrated_pages() > before {
            return Ok((first, taken, message(&host.device, INFLATE)?));
        }
    }

    Err(ENOENT)
}

/// How many kernel pages are migrated at once: so few that one message has room for them.
const PAGES: usize = MESSAGE as usize / BALLOON_PAGES_PER_PAGE / 4;

/// Makes a balloon of movable pages.
fn movable(features: &[FeatureBit]) -> Result<Host> {
    // In steps that are too small for blocks, which cannot be migrated. Some of the pageblocks then
    // contain movable pages only.
    let step = (BALLOON_PAGES_PER_PAGE << pageblock_order()) / 2;
    let size = MANY.max(12 * step as u32);
    let mut host = Host::new(features)?;

    for size in (step as u32..=size).step_by(step) {
        host.resize(size, size)?;
    }
    // The driver allows page migration after it has reported the size.
    wait_runs(&host.device)?;
    Ok(host)
}

/// Returns whether the kernel can migrate pages of the balloon after `spoil`.
fn moves_after(spoil: impl FnOnce(&FakeDevice) -> Result) -> Result<bool> {
    let host = movable(&[FeatureBit::VERSION_1])?;

    spoil(&host.device)?;
    wait_runs(&host.device)?;
    let mut places = consecutive(&host, PAGES).take(64);
    Ok(places.any(|first| PageList::alloc_range(first, PAGES).is_ok()))
}

/// Makes the kernel migrate pages of the balloon, and the balloon deflate before the device has
/// seen that.
///
/// # Errors
///
/// `EINVAL` if any page leaves the balloon before the device has acknowledged the new pages, or if
/// the driver does not report everything afterwards.
fn moved(features: &[FeatureBit]) -> Result {
    let mut host = movable(features)?;
    let size = host.device.field(ACTUAL);

    // The old pages are free at once, unless the device must be notified first.
    let (_, taken, request) = take_out(&host, PAGES)?;
    let waits = features.contains(&F_MUST_TELL_HOST) || features.contains(&F_PAGE_SETS);
    if taken.is_ok() == waits || host.device.field(ACTUAL) != size {
        return Err(EINVAL);
    }
    host.device.change(NUM_PAGES, 0);

    // Each message may have only some of the migrations. The others follow when the device has used
    // it, and only then does the balloon deflate.
    let mut pages = 0;
    let mut next = Some(request);
    while let Some(request) = next.take() {
        fsleep(Delta::from_millis(20));
        if host.device.field(ACTUAL) != size || host.device.next(DEFLATE)?.is_some() {
            return Err(EINVAL);
        }

        let pfns = listed_pfns(&host.device, INFLATE, &request)?;
        pages += pfns.len() / BALLOON_PAGES_PER_PAGE;
        host.inflated.extend_from_slice(&pfns, GFP_KERNEL)?;
        host.device.answer(INFLATE, &request, 0)?;
        host.device.interrupt(INFLATE)?;
        eventually(|| {
            serve(&host.device, DEFLATE, &mut host.deflated)?;
            next = host.device.next(INFLATE)?;
            Ok(next.is_some() || host.device.field(ACTUAL) != size)
        })?;
    }
    if taken.is_ok() && pages != PAGES {
        return Err(EINVAL);
    }
    host.settle(0)?;
    drop(taken);

    compare(&host)
}

/// Allocates each block of `pages` kernel pages that is full of the balloon, on a device that uses
/// messages at once. Returns their number.
///
/// # Errors
///
/// The kernel's error if one cannot be allocated at the first attempt.
fn take_out_blocks(host: &Host, pages: usize) -> Result<usize> {
    let mut taken = 0;

    host.device.answer_all(true);
    for first in consecutive(host, pages) {
        // The balloon inflates elsewhere after a block has left.
        wait_runs(&host.device)?;
        let begin = Instant::<Monotonic>::now();

        match PageList::alloc_range(first, pages) {
            Ok(_) => taken += 1,
            // On a busy machine the driver's task may not get a processor in time.
            Err(_) if begin.elapsed() > timeouts::MIGRATION => (),
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

/// Makes the balloon deflate on OOM, on a device that does not interrupt.
///
/// # Errors
///
/// `ETIMEDOUT` if the driver does not report the new size, `ENODATA` if it deflates nothing.
fn give_back_for_oom() -> Result {
    // More than an OOM deflates.
    const SIZE: u32 = 80 << (20 - PFN_SHIFT);
    let _short = Pretence::is_short();
    let mut host = Host::new(&[FeatureBit::VERSION_1, F_MUST_TELL_HOST, F_DEFLATE_ON_OOM])?;
    host.resize(SIZE, SIZE)?;
    // Longer than a device counts as responsive.
    fsleep(Delta::from_millis(200));

    host.device.answer_all(false);
    let pages = out_of_memory() * BALLOON_PAGES_PER_PAGE;
    if pages == 0 {
        return Err(ENODATA);
    }
    // The balloon does not grow for 10 seconds, and there is no other event meanwhile.
    reaches(&host.device, SIZE - pages as u32)
}

/// Makes a balloon of `size` balloon pages deflate on OOM. Returns by how many balloon pages.
fn deflated_for_oom(size: u32) -> Result<u32> {
    let mut host = Host::new(&[FeatureBit::VERSION_1, F_PAGE_SETS, F_DEFLATE_ON_OOM])?;
    host.resize(size, size)?;
    host.device.answer_all(true);
    let _short = Pretence::is_short();

    Ok((out_of_memory() * BALLOON_PAGES_PER_PAGE) as u32)
}

/// Pretends from the first inflate message on that no memory is available.
fn fill_guest(_device: &FakeDevice, queue: usize) {
    if queue == INFLATE {
        mem::forget(Pretence::is_full());
    }
}

/// Ends what [`fill_guest`] pretends.
struct Emptied;

impl Drop for Emptied {
    fn drop(&mut self) {
        drop(Pretence::is_full());
    }
}

/// Inflates with small portions. Returns how many messages the driver sends after memory has become
/// short.
fn messages_when_short() -> Result<usize> {
    let device = FakeDevice::with_callback(&PAGE_SETS, fill_guest)?;
    let _zeroing = Pretence::zeroes_on_allocation();
    let _emptied = Emptied;

    device.change(NUM_PAGES, 8 * BLOCK);
    message(&device, INFLATE)?;
    // Long enough for further ones.
    fsleep(Delta::from_millis(100));

    let mut further = 0;
    while device.next(INFLATE)?.is_some() {
        further += 1;
    }
    Ok(further)
}

/// How often the driver has notified a device that was not ready.
static EARLY_KICKS: Atomic<u32> = Atomic::new(0);

fn count_early_kick(device: &FakeDevice, _queue: usize) {
    if !device.is_ready() {
        EARLY_KICKS.add(1, Relaxed);
    }
}

/// Waits for the driver's statistics, and returns the value of the kind `tag`.
pub(super) fn statistic(device: &FakeDevice, tag: u16) -> Result<(Request, u64)> {
    let request = message(device, STATS)?;
    let mut value = None;

    // An entry has 10 bytes: five 16-bit words, of which the first is the tag.
    let mut words = request.words.iter();
    while let Some(&this) = words.next() {
        let mut bits = 0;
        for shift in [0, 16, 32, 48] {
            bits |= u64::from(u16::from_le(*words.next().ok_or(EINVAL)?)) << shift;
        }
        if u16::from_le(this) == tag {
            value = Some(bits);
        }
    }

    Ok((request, value.ok_or(ENOENT)?))
}

/// Sets a target beyond the guest's memory, and waits until the driver reports `reason`. Resets the
/// target, and returns the reason after that.
fn stop(reason: u32) -> Result<u32> {
    let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STOP_REASON])?;
    let answer = |queue| {
        while let Some(request) = device.next(queue)? {
            device.answer(queue, &request, 0)?;
        }
        device.interrupt(queue)
    };

    device.change(NUM_PAGES, u32::MAX);
    eventually(|| {
        answer(INFLATE)?;
        Ok(device.field(STOP_REASON) == reason)
    })?;

    device.change(NUM_PAGES, 0);
    eventually(|| {
        answer(INFLATE)?;
        answer(DEFLATE)?;
        Ok(device.field(ACTUAL) == 0)
    })?;
    Ok(device.field(STOP_REASON))
}

/// Returns the size and the stop reason in `request`, if it is a status.
fn status(request: &Request) -> Option<(u32, u32)> {
    const COMMAND: u16 = 8;
    let words: &[u16; 12] = request.words.as_slice().try_into().ok()?;
    let number = |at: usize| {
        u32::from(u16::from_le(words[at])) | u32::from(u16::from_le(words[at + 1])) << 16
    };

    (u16::from_le(words[0]) == COMMAND && words[1..8].iter().all(|&word| word == 0))
        .then(|| (number(8), number(10)))
}

/// Uses the messages of both queues until the last status has the size `size`, in balloon pages,
/// and the stop reason `reason`.
fn until_status(device: &FakeDevice, size: Option<u32>, reason: u32) -> Result {
    let mut last = None;

    eventually(|| {
        for queue in [INFLATE, DEFLATE] {
            while let Some(request) = device.next(queue)? {
                last = status(&request).or(last);
                device.answer(queue, &request, 0)?;
            }
            device.interrupt(queue)?;
        }
        Ok(last.is_some_and(|last| size.is_none_or(|size| size == last.0) && last.1 == reason))
    })
}

/// Uses the first message of the deflate queue.
fn use_first_deflate(device: &FakeDevice, queue: usize) {
    if queue == DEFLATE {
        let _ = device.answer_raw(queue, 0, 0);
        let _ = device.interrupt(queue);
    }
}

/// When the kernel has begun to report: it starts two seconds after the registration.
const BEGUN: Delta = Delta::from_millis(3_000);

/// Calls `act` during a report of free pages, and unbinds the driver. Returns whether the pages of
/// the report are free again.
fn while_reporting(act: impl FnOnce(&FakeDevice, &Request) -> Result) -> Result<bool> {
    const NOISE: u64 = 1 << 20;
    let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_PAGE_POISON, F_REPORTING])?;

    // Pages on per-CPU page lists prevent other pages from merging into reported blocks.
    drain::drain_free_lists();
    let report = message(&device, REPORTS)?;
    let before = free();
    act(&device, &report)?;
    drop(device);

    Ok(free() + NOISE >= before + report.writable as u64)
}

#[kunit_tests(virtio_balloon_rs_device)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_binds_and_makes_the_device_ready() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1]);

        assert!(device.is_ok_and(|device| device.is_ready()));
    }

    #[test]
    fn known_features_are_accepted_and_others_are_not() {
        let device = FakeDevice::new(&[
            FeatureBit::VERSION_1,
            FeatureBit::ACCESS_PLATFORM,
            F_MUST_TELL_HOST,
        ]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        assert!(device.has_feature(F_MUST_TELL_HOST));
        assert!(!device.has_feature(FeatureBit::ACCESS_PLATFORM));
    }

    #[test]
    fn a_value_of_free_pages_is_announced_where_there_is_one() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_PAGE_POISON, F_REPORTING]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };
        let value = memory::free_page_value();

        assert_eq!(device.has_feature(F_PAGE_POISON), value.is_some());
        assert_eq!(device.field(POISON_VAL), value.unwrap_or(0));
        assert!(device.has_feature(F_REPORTING));
    }

    #[test]
    fn free_pages_are_not_reported_to_a_device_that_cannot_know_their_value() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_REPORTING]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        assert_eq!(
            device.has_feature(F_REPORTING),
            memory::free_page_value().is_none()
        );
    }

    #[test]
    fn a_second_device_works_without_reporting() {
        let features = [FeatureBit::VERSION_1, F_PAGE_POISON, F_REPORTING];
        let hosts = (Host::new(&features), Host::new(&features));
        assert!(hosts.0.is_ok() && hosts.1.is_ok());
        let (Ok(_first), Ok(mut second)) = hosts else {
            return;
        };

        assert!(second.device.is_ready());
        assert_eq!(second.resize(MESSAGE, MESSAGE), Ok(()));
        assert_eq!(second.resize(0, 0), Ok(()));
    }

    #[test]
    fn an_oom_calls_hints_first_and_the_balloon_when_it_calls_virtio_balloon() -> Result {
        /// `VIRTIO_BALLOON_OOM_NOTIFY_PRIORITY` of that driver.
        const PRIORITY: c_int = 80;

        let _balloon = FakeDevice::new(&[FeatureBit::VERSION_1, F_DEFLATE_ON_OOM])?;
        assert_eq!(priority(), Some(PRIORITY));
        let _hints = FakeDevice::new(&[FeatureBit::VERSION_1, F_FREE_PAGE_HINT])?;
        assert!(priority() > Some(PRIORITY));
        Ok(())
    }

    #[test]
    fn all_pages_are_listed_once() {
        for pages in [1, MESSAGE - 1, MESSAGE, MESSAGE + 1, MANY] {
            assert_eq!(cycle(&[FeatureBit::VERSION_1], pages), Ok(()));
        }
    }

    #[test]
    fn a_legacy_device_works() {
        assert_eq!(cycle(&[], 3 * MESSAGE), Ok(()));
    }

    #[test]
    fn a_device_with_must_tell_host_works() {
        assert_eq!(
            cycle(&[FeatureBit::VERSION_1, F_MUST_TELL_HOST], MANY),
            Ok(())
        );
    }

    #[test]
    fn page_sets_list_all_pages_once() {
        for pages in [1, MESSAGE + 1, MANY, 2 * BLOCK, 3 * BLOCK - 1] {
            assert_eq!(cycle(&PAGE_SETS, pages), Ok(()));
        }
    }

    #[test]
    fn page_sets_need_a_modern_device() {
        let device = FakeDevice::new(&[F_PAGE_SETS]);

        assert!(device.is_ok_and(|device| !device.has_feature(F_PAGE_SETS)));
    }

    #[test]
    fn blocks_are_listed_in_few_words_with_one_notification() {
        let device = FakeDevice::new(&PAGE_SETS);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(NUM_PAGES, BLOCKS * BLOCK);
        assert_eq!(eventually(|| Ok(device.kicks(INFLATE) > 0)), Ok(()));
        fsleep(Delta::from_millis(20));

        // A header, and two words for each block without an adjacent one.
        let request = device.next(INFLATE);
        assert!(request.is_ok_and(|request| request.is_some_and(|request| {
            request.words.len() <= (4 + 2 * BLOCKS as usize) * 4
                && page_set(INFLATE, &request).is_ok_and(|pfns| pfns.len() as u32 == BLOCKS * BLOCK)
        })));
        assert_eq!(device.kicks(INFLATE), 1);
        assert!(device.next(INFLATE).is_ok_and(|request| request.is_none()));
    }

    #[test]
    fn a_balloon_of_blocks_shrinks_by_a_page() {
        let host = Host::new(&PAGE_SETS);
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };
        let page = BALLOON_PAGES_PER_PAGE as u32;

        assert_eq!(host.resize(2 * BLOCK, 2 * BLOCK), Ok(()));
        for size in [2 * BLOCK - page, BLOCK + page, BLOCK, page, 0] {
            assert_eq!(host.resize(size, size), Ok(()));
            assert_eq!(compare(&host), Ok(()));
        }
    }

    #[test]
    fn blocks_come_back_when_the_device_has_answered() {
        let total = memory::total_pages();
        let result = deflate_unanswered(&PAGE_SETS, BLOCKS * BLOCK, 1);

        assert_eq!(result, Ok(false));
        assert_eq!(memory::total_pages(), total);
    }

    #[test]
    fn a_device_that_is_not_ready_is_not_notified() -> Result {
        EARLY_KICKS.store(0, Relaxed);
        let features = [FeatureBit::VERSION_1, F_STATS_VQ, F_FREE_PAGE_HINT];
        let device = FakeDevice::with_callback(&features, count_early_kick)?;

        eventually(|| Ok(device.kicks(STATS) > 0))?;
        assert_eq!(EARLY_KICKS.load(Relaxed), 0);
        Ok(())
    }

    #[test]
    fn statistics_are_there_from_the_beginning() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STATS_VQ]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        let total = statistic(&device, stat::MEMTOT);
        let info = Info::now();
        let sample = new_buffer();
        assert!(sample.is_ok());
        let Ok(mut sample) = sample else { return };
        collect(&mut sample, &info, ByteOrder::Native);
        assert!(total.is_ok_and(
            |(request, total)| total == info.total && request.words.len() == 5 * sample.len()
        ));
    }

    #[test]
    fn statistics_are_renewed_while_inflating_is_stuck() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STATS_VQ]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(NUM_PAGES, MANY);
        for _ in 0..100 {
            let sample = statistic(&device, stat::MEMFREE);
            assert!(sample.is_ok());
            let Ok((request, _)) = sample else { return };

            // Only one buffer at a time.
            assert!(device.next(STATS).is_ok_and(|next| next.is_none()));
            assert!(device.answer(STATS, &request, 0).is_ok());
            assert!(device.interrupt(STATS).is_ok());
            assert!(device.interrupt(STATS).is_ok());
        }
    }

    #[test]
    fn migrations_are_reported_to_the_device() {
        for features in [
            &[FeatureBit::VERSION_1][..],
            &[FeatureBit::VERSION_1, F_MUST_TELL_HOST],
            &PAGE_SETS,
        ] {
            assert_eq!(moved(features), Ok(()));
        }
    }

    #[test]
    fn no_page_is_migrated_once_a_queue_is_broken() {
        let spoil = |device: &FakeDevice| {
            device.answer_raw(DEFLATE, u32::MAX, 0)?;
            device.interrupt(DEFLATE)
        };

        assert_eq!(moves_after(|_| Ok(())), Ok(true));
        assert_eq!(moves_after(spoil), Ok(false));
    }

    #[test]
    fn two_devices_work_at_once() {
        let hosts = (
            Host::new(&[FeatureBit::VERSION_1]),
            Host::new(&[FeatureBit::VERSION_1]),
        );
        assert!(hosts.0.is_ok() && hosts.1.is_ok());
        let (Ok(mut first), Ok(mut second)) = hosts else {
            return;
        };

        assert_eq!(first.resize(MESSAGE, MESSAGE), Ok(()));
        assert_eq!(second.resize(2 * MESSAGE, 2 * MESSAGE), Ok(()));
        assert_eq!(first.resize(0, 0), Ok(()));
        assert_eq!(second.device.field(ACTUAL), 2 * MESSAGE);
    }

    #[test]
    fn messages_are_announced_in_batches() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(NUM_PAGES, MANY);
        assert_eq!(eventually(|| Ok(device.kicks(INFLATE) > 0)), Ok(()));
        fsleep(Delta::from_millis(20));

        let mut waiting = 0;
        while device.next(INFLATE).is_ok_and(|request| request.is_some()) {
            waiting += 1;
        }
        assert_eq!(waiting, MESSAGES_IN_FLIGHT);
        // The device reads the first messages while the driver writes the others.
        assert_eq!(
            device.kicks(INFLATE) as usize,
            waiting / MESSAGES_PER_NOTIFICATION
        );
    }

    #[test]
    fn the_reserve_is_checked_again_while_inflating() {
        assert!(messages_when_short().is_ok_and(|messages| messages < 2));
    }

    #[test]
    fn up_to_12_messages_are_in_flight() -> Result {
        const MOST: u32 = 12;
        let device = FakeDevice::new(&BASE)?;
        let mut waiting = 0;

        // The queue has room for more.
        assert!(QUEUE_SIZE > MOST);
        device.change(NUM_PAGES, 2 * MOST * MESSAGE);
        eventually(|| {
            while device.next(INFLATE)?.is_some() {
                waiting += 1;
            }
            Ok(waiting >= MOST)
        })?;
        fsleep(Delta::from_millis(20));
        assert!(device.next(INFLATE)?.is_none());
        assert_eq!(waiting, MOST);
        Ok(())
    }

    #[test]
    fn pages_count_when_the_device_has_answered() {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1]);
        assert!(device.is_ok());
        let Ok(device) = device else { return };

        device.change(NUM_PAGES, 2 * MESSAGE);
        assert_eq!(eventually(|| Ok(device.kicks(INFLATE) > 0)), Ok(()));
        // So long that the size of a changing balloon is reported.
        fsleep(Delta::from_millis(1_100));
        assert_eq!(device.field(ACTUAL), 0);

        // Out of order, and one only.
        let first = device.next(INFLATE);
        let second = device.next(INFLATE);
        assert!(second.is_ok_and(
            |second| second.is_some_and(|second| device.answer(INFLATE, &second, 0).is_ok())
        ));
        assert!(device.interrupt(INFLATE).is_ok());
        assert_eq!(reaches(&device, MESSAGE), Ok(()));

        assert!(first.is_ok_and(
            |first| first.is_some_and(|first| device.answer(INFLATE, &first, 0).is_ok())
        ));
        assert!(device.interrupt(INFLATE).is_ok());
        assert_eq!(reaches(&device, 2 * MESSAGE), Ok(()));
    }

    #[test]
    fn pages_are_marked_when_the_device_has_answered() -> Result {
        // The page frame numbers of a legacy device are in the guest's byte order.
        for features in [&BASE[..], &[]] {
            let device = FakeDevice::new(features)?;

            device.change(NUM_PAGES, MESSAGE);
            let request = message(&device, INFLATE)?;
            let pfns = request.pfns()?;
            let is_marked = |&pfn: &u32| memory::is_offline(pfn as usize / BALLOON_PAGES_PER_PAGE);
            assert!(!pfns.is_empty() && !pfns.iter().any(is_marked));

            device.answer(INFLATE, &request, 0)?;
            device.interrupt(INFLATE)?;
            reaches(&device, MESSAGE)?;
            assert!(pfns.iter().all(is_marked));
        }
        Ok(())
    }

    #[test]
    fn a_target_costs_a_read_and_a_write() -> Result {
        for features in [
            &BASE[..],
            &[FeatureBit::VERSION_1, F_MUST_TELL_HOST],
            &PAGE_SETS,
            &[FeatureBit::VERSION_1, F_STOP_REASON],
        ] {
            let mut host = Host::new(features)?;
            // With that the accesses at the beginning are over.
            host.resize(MESSAGE, MESSAGE)?;
            let mut before = host.device.accesses();

            for target in [MANY, MANY + 4 * MESSAGE, MESSAGE, 0] {
                let begin = Instant::<Monotonic>::now();
                host.resize(target, target)?;
                // The driver also writes once a second while the size changes.
                let most = 1 + (begin.elapsed().as_millis() / 1_000) as u32;
                // Interrupts and time cost none either.
                host.device.interrupt(INFLATE)?;
                host.device.interrupt(DEFLATE)?;
                fsleep(Delta::from_millis(50));
                let now = host.device.accesses();
                assert_eq!(now.0, before.0 + 1);
                assert!((1..=most).contains(&(now.1 - before.1)));
                before = now;
            }
        }
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn an_unresponsive_device_is_not_accessed() -> Result {
        for features in [
            &BASE[..],
            &[FeatureBit::VERSION_1, F_MUST_TELL_HOST],
            &PAGE_SETS,
        ] {
            let mut host = Host::new(features)?;

            host.resize(MANY, MANY)?;
            let (reads, writes) = host.device.accesses();
            // The driver reads the target, and reports nothing.
            host.device.change(NUM_PAGES, MESSAGE);
            eventually(|| Ok(host.device.kicks(DEFLATE) > 0))?;
            fsleep(Delta::from_millis(2_500));
            host.device.freeze()?;
            assert_eq!(host.device.accesses(), (reads + 1, writes));
            // It is not started again either.
            assert!(host.device.restore(QUEUE_SIZE).is_err() && !host.device.is_ready());
        }
        Ok(())
    }

    #[test]
    fn a_read_that_fails_is_no_target() -> Result {
        let mut host = Host::new(&BASE)?;

        host.resize(MESSAGE, MESSAGE)?;
        host.device.fail_reads(true);
        let (reads, _) = host.device.accesses();
        host.device.change(NUM_PAGES, 2 * MESSAGE);
        eventually(|| Ok(host.device.accesses().0 > reads))?;
        fsleep(Delta::from_millis(50));
        assert!(host.device.next(INFLATE)?.is_none() && host.device.next(DEFLATE)?.is_none());

        // It is read again.
        host.device.fail_reads(false);
        host.settle(2 * MESSAGE)
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_target_that_cannot_be_read_does_not_keep_the_system_awake() -> Result {
        let mut host = Host::new(&BASE)?;

        host.device.enable_wakeup()?;
        host.resize(MESSAGE, MESSAGE)?;
        eventually(|| Ok(!host.device.is_awake()))?;
        host.device.fail_reads(true);
        host.device.change(NUM_PAGES, 2 * MESSAGE);
        eventually(|| Ok(host.device.is_awake()))?;
        eventually(|| Ok(!host.device.is_awake()))?;

        host.device.fail_reads(false);
        host.settle(2 * MESSAGE)
    }

    #[test]
    fn a_read_that_is_torn_is_no_target() -> Result {
        // A device of before version 1.0.
        let mut host = Host::new(&[])?;

        host.resize(MESSAGE, MESSAGE)?;
        host.device.tear_read(0);
        host.resize(2 * MESSAGE, 2 * MESSAGE)?;
        assert!(host.deflated.is_empty());
        Ok(())
    }

    #[test]
    fn deflating_does_not_wait_for_the_device() {
        let result = deflate_unanswered(&BASE, MANY, MESSAGES_IN_FLIGHT);

        // All pages have left the balloon, and as many of their messages as may be are in flight.
        assert_eq!(result, Ok(true));
    }

    #[test]
    fn the_size_is_reported_after_an_oom_without_interrupts() {
        assert_eq!(give_back_for_oom(), Ok(()));
    }

    #[test]
    fn an_oom_deflates_an_eighth_and_64_mib_at_least() {
        const MIB: u32 = 1 << (20 - PFN_SHIFT);

        assert_eq!(deflated_for_oom(80 * MIB), Ok(64 * MIB));
        assert_eq!(deflated_for_oom(560 * MIB), Ok(70 * MIB));
    }

    #[test]
    fn a_pageblock_is_free_as_soon_as_its_last_page_was_migrated() -> Result {
        for features in [&[FeatureBit::VERSION_1, F_MUST_TELL_HOST][..], &PAGE_SETS] {
            assert!(take_out_blocks(&movable(features)?, 1 << pageblock_order())? > 1);
        }
        Ok(())
    }

    #[test]
    fn a_block_is_free_as_soon_as_its_memory_is_needed() -> Result {
        let mut host = Host::new(&PAGE_SETS)?;

        host.resize(BLOCKS * BLOCK, BLOCKS * BLOCK)?;
        assert!(take_out_blocks(&host, 1 << MAX_ORDER)? > 1);
        host.device.change(NUM_PAGES, 0);
        reaches(&host.device, 0)
    }

    #[test]
    fn a_block_is_not_free_before_the_device_has_answered() -> Result {
        let mut host = Host::new(&PAGE_SETS)?;
        host.resize(BLOCKS * BLOCK, BLOCKS * BLOCK)?;
        wait_runs(&host.device)?;

        let first = consecutive(&host, 1 << MAX_ORDER).next().ok_or(ENOENT)?;
        assert!(PageList::alloc_range(first, 1 << MAX_ORDER).is_err());
        let request = message(&host.device, DEFLATE)?;
        let pfns = listed_pfns(&host.device, DEFLATE, &request)?;
        assert_eq!(pfns.len(), BLOCK as usize);
        assert_eq!(
            pfns.first(),
            Some(&((first * BALLOON_PAGES_PER_PAGE) as u32))
        );
        assert!(host.device.next(INFLATE)?.is_none());
        assert_eq!(host.device.field(ACTUAL), BLOCKS * BLOCK);

        // Then the balloon inflates elsewhere, perhaps with the same memory.
        host.inflated.retain(|pfn| !pfns.contains(pfn));
        host.device.answer(DEFLATE, &request, 0)?;
        host.device.interrupt(DEFLATE)?;
        let len = host.inflated.len() + BLOCK as usize;
        eventually(|| {
            serve(&host.device, INFLATE, &mut host.inflated)?;
            Ok(host.inflated.len() == len)
        })?;
        host.resize(0, 0)?;
        compare(&host)
    }

    #[test]
    fn deflating_waits_for_the_device_where_it_must() {
        let features = [FeatureBit::VERSION_1, F_MUST_TELL_HOST];
        let result = deflate_unanswered(&features, MANY, MESSAGES_IN_FLIGHT);

        // As many deflate messages as may be are in flight.
        assert_eq!(result, Ok(false));
    }

    #[test]
    fn a_target_that_changes_all_the_time_is_followed() {
        let host = Host::new(&[FeatureBit::VERSION_1]);
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        for n in 0..50u32 {
            host.device.change(NUM_PAGES, (n * 7 % 11) * MESSAGE);
            let _ = serve(&host.device, INFLATE, &mut host.inflated);
            let _ = serve(&host.device, DEFLATE, &mut host.deflated);
        }
        assert_eq!(host.resize(5 * MESSAGE, 5 * MESSAGE), Ok(()));
        assert_eq!(host.resize(0, 0), Ok(()));
    }

    #[test]
    fn interrupts_without_reason_do_no_harm() {
        let host = Host::new(&[FeatureBit::VERSION_1]);
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        for _ in 0..1_000 {
            assert!(host.device.interrupt(INFLATE).is_ok());
            assert!(host.device.interrupt(DEFLATE).is_ok());
        }
        assert_eq!(host.resize(MESSAGE, MESSAGE), Ok(()));
    }

    #[test]
    fn the_length_in_an_answer_does_not_matter() {
        assert_eq!(
            misbehave(&BASE, |device, request| device.answer(
                INFLATE,
                request,
                u32::MAX
            )),
            Ok(0)
        );
    }

    #[test]
    fn a_device_that_never_answers_can_be_removed() {
        for features in [&BASE[..], &PAGE_SETS] {
            assert_eq!(misbehave(features, |_, _| Ok(())), Ok(0));
        }
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn an_unresponsive_device_keeps_nothing_during_a_suspend() -> Result {
        for features in [&BASE[..], &PAGE_SETS] {
            let before = free();
            let device = FakeDevice::new(features)?;
            device.change(NUM_PAGES, MANY);
            eventually(|| Ok(device.next(INFLATE)?.is_some()))?;
            device.freeze()?;
            // By far fewer than it was sent.
            assert!(free() + (4 << 20) > before);
        }
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn migrated_pages_are_free_while_the_system_is_suspended() -> Result {
        let host = movable(&[FeatureBit::VERSION_1, F_MUST_TELL_HOST])?;
        let (place, taken, _) = take_out(&host, PAGES)?;

        // The pages are held until the device has used the message, which it does not.
        assert!(taken.is_err() && PageList::alloc_range(place, PAGES).is_err());
        host.device.freeze()?;
        assert!(PageList::alloc_range(place, PAGES).is_ok());
        Ok(())
    }

    #[test]
    fn an_answer_to_nothing_breaks_the_queue_and_nothing_else() {
        assert_eq!(
            misbehave(&BASE, |device, _| device.answer_raw(
                INFLATE,
                QUEUE_SIZE - 1,
                0
            )),
            Ok(0)
        );
    }

    #[test]
    fn an_answer_out_of_range_breaks_the_queue_and_nothing_else() {
        assert_eq!(
            misbehave(&BASE, |device, _| device.answer_raw(INFLATE, u32::MAX, 0)),
            Ok(0)
        );
    }

    #[test]
    fn an_answer_given_twice_does_no_harm() {
        assert_eq!(
            misbehave(&BASE, |device, request| {
                device.answer(INFLATE, request, 0)?;
                device.answer(INFLATE, request, 0)
            }),
            Ok(0)
        );
    }

    #[test]
    fn a_device_with_stop_reasons_gets_them() {
        assert_eq!(stop(stop_reason::FLOOR), Ok(stop_reason::NONE));
    }

    #[test]
    fn the_status_comes_in_messages() -> Result {
        let device =
            FakeDevice::new(&[FeatureBit::VERSION_1, F_PAGE_SETS, F_STOP_REASON, F_STATUS])?;

        until_status(&device, Some(0), stop_reason::NONE)?;
        device.change(NUM_PAGES, MESSAGE);
        until_status(&device, Some(MESSAGE), stop_reason::NONE)?;
        device.change(NUM_PAGES, u32::MAX);
        until_status(&device, None, stop_reason::FLOOR)?;
        device.change(NUM_PAGES, 0);
        until_status(&device, Some(0), stop_reason::NONE)?;

        assert_eq!(device.accesses().1, 0);
        Ok(())
    }

    #[test]
    fn the_driver_waits_for_the_last_status() -> Result {
        let features = [FeatureBit::VERSION_1, F_PAGE_SETS, F_STATUS];
        let device = FakeDevice::with_callback(&features, use_first_deflate)?;

        device.change(NUM_PAGES, MESSAGE);
        until_status(&device, Some(MESSAGE), stop_reason::NONE)?;

        // The device does not use the status of the empty balloon.
        let begin = Instant::<Monotonic>::now();
        drop(device);
        assert!(begin.elapsed() >= timeouts::TEARDOWN_STALL);
        Ok(())
    }

    #[test]
    fn a_status_needs_page_sets() -> Result {
        let mut host = Host::new(&[FeatureBit::VERSION_1, F_STATUS])?;

        assert!(!host.device.has_feature(F_STATUS));
        host.resize(MESSAGE, MESSAGE)
    }

    #[test]
    fn the_reason_is_not_written_where_there_is_no_field_for_it() {
        let host = Host::new(&[FeatureBit::VERSION_1]);
        assert!(host.is_ok());
        let Ok(mut host) = host else { return };

        host.device.change(STOP_REASON, u32::MAX);
        assert_eq!(host.resize(MESSAGE, MESSAGE), Ok(()));
        assert_eq!(host.resize(0, 0), Ok(()));
        assert_eq!(host.device.field(STOP_REASON), u32::MAX);
    }

    #[test]
    fn reports_continue_when_the_device_answers() {
        assert_eq!(
            while_reporting(|device, report| {
                device.answer(REPORTS, report, 0)?;
                device.interrupt(REPORTS)?;
                eventually(|| Ok(device.next(REPORTS)?.is_some()))
            }),
            Ok(true)
        );
    }

    #[test]
    fn a_device_that_never_answers_a_report_can_be_removed() {
        assert_eq!(while_reporting(|_, _| Ok(())), Ok(true));
    }

    #[test]
    fn nothing_is_reported_while_the_reserve_lock_is_held() -> Result {
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_PAGE_POISON, F_REPORTING])?;
        let taking = memory::ReserveGuard::begin();

        fsleep(BEGUN);
        let report = device.next(REPORTS)?;
        drop(taking);
        assert!(report.is_none());

        eventually(|| Ok(device.next(REPORTS)?.is_some()))
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_report_that_is_longer_than_the_queue_is_not_sent() -> Result {
        let mut host = Host::new(&[FeatureBit::VERSION_1, F_PAGE_POISON, F_REPORTING])?;

        host.device.freeze()?;
        host.device.restore(1)?;
        // The ring code would warn about it.
        fsleep(BEGUN);
        assert!(host.device.next(REPORTS)?.is_none());

        // A message has room for them.
        host.resize(2 * MESSAGE, 2 * MESSAGE)?;
        host.resize(0, 0)
    }

    #[test]
    fn a_broken_answer_to_a_report_does_no_harm() {
        assert_eq!(
            while_reporting(|device, _| {
                device.answer_raw(REPORTS, u32::MAX, u32::MAX)?;
                device.interrupt(REPORTS)
            }),
            Ok(true)
        );
    }
}
