// SPDX-License-Identifier: GPL-2.0

//! The order in which features are quiesced.

#![cfg_attr(not(CONFIG_PM_SLEEP), expect(unused_imports))]

use super::device::{
    eventually,
    message, //
};

use crate::{
    device::timeouts,
    messages::balloon_page::BALLOON_PAGES_PER_PAGE,
    rust::{
        mm::memory::{
            self,
            Pretence, //
        },
        notifiers::oom::last::out_of_memory,
        virtio::{
            fake_device::{
                FakeDevice,
                Request,
                QUEUE_SIZE, //
            },
            FeatureBit, //
        },
        virtio_balloon::{
            request,
            ACTUAL,
            F_DEFLATE_ON_OOM,
            F_FREE_PAGE_HINT,
            F_HOST_REQUESTS,
            F_MUST_TELL_HOST,
            F_PAGE_SETS,
            F_STATS_VQ,
            HINT_ID,
            HINT_STOP,
            NUM_PAGES,
            PFN_SHIFT, //
        },
        work::thread::Thread, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

const FEATURES: [FeatureBit; 5] = [
    FeatureBit::VERSION_1,
    F_PAGE_SETS,
    F_STATS_VQ,
    F_FREE_PAGE_HINT,
    F_HOST_REQUESTS,
];

/// The queues of a device with these features.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINTS: usize = 3;
const REQUESTS: usize = 4;

/// The size of the balloon, in balloon pages.
const SIZE: u32 = 256;

/// Set when the device must act as soon as the driver deflates the balloon: it requests statistics,
/// and makes a host request.
static IS_DUE: Atomic<bool> = Atomic::new(false);

/// The buffers for that.
static STATS_ID: Atomic<u32> = Atomic::new(0);
static REQUEST_ID: Atomic<u32> = Atomic::new(0);

/// The free kernel pages at that moment, and the driver's notifications since then.
static FREE: Atomic<usize> = Atomic::new(0);
static STATS_KICKS: Atomic<u32> = Atomic::new(0);
static REQUEST_KICKS: Atomic<u32> = Atomic::new(0);

/// The words of a request.
const REQUEST_WORDS: usize = 16;

fn on_kick(device: &FakeDevice, queue: usize) {
    match queue {
        DEFLATE if IS_DUE.xchg(false, Relaxed) => (),
        STATS => return STATS_KICKS.add(1, Relaxed),
        REQUESTS => return REQUEST_KICKS.add(1, Relaxed),
        _ => return,
    }

    FREE.store(memory::free_pages(), Relaxed);
    STATS_KICKS.store(0, Relaxed);
    REQUEST_KICKS.store(0, Relaxed);
    let len = (REQUEST_WORDS * size_of::<u16>()) as u32;
    for (queue, id, len) in [(STATS, &STATS_ID, 0), (REQUESTS, &REQUEST_ID, len)] {
        let _ = device.answer_raw(queue, id.load(Relaxed), len);
        let _ = device.interrupt(queue);
    }
}

/// Uses the next message on `queue`, and returns it.
fn serve(device: &FakeDevice, queue: usize) -> Result<Request> {
    let request = message(device, queue)?;

    device.answer(queue, &request, 0)?;
    device.interrupt(queue)?;
    Ok(request)
}

/// Uses the messages of a round of hints. Returns how many kernel pages were hinted.
fn hint(device: &FakeDevice) -> Result<usize> {
    let mut hinted = 0;

    device.change(HINT_ID, 2);
    loop {
        let request = serve(device, HINTS)?;

        hinted += request.writable >> PAGE_SHIFT;
        if request.pfns()?.as_slice() == [HINT_STOP] {
            return Ok(hinted);
        }
    }
}

/// Suspends the driver several times while the guest runs out of memory. Returns how many times the
/// device counts a balloon afterwards.
///
/// # Errors
///
/// `ETIMEDOUT` if the balloon does not reach its size.
#[cfg(CONFIG_PM_SLEEP)]
fn suspend_out_of_memory() -> Result<usize> {
    const ROUNDS: u32 = 10;
    // More than an OOM deflates.
    const SIZE: u32 = 80 << (20 - PFN_SHIFT);
    static HAS_BEGUN: Atomic<bool> = Atomic::new(false);
    // With a virtio-mem device the balloon has order-0 pages only, which take long to free.
    let _virtio_mem = FakeDevice::virtio_mem()?;
    let _short = Pretence::is_short();
    let features = [
        FeatureBit::VERSION_1,
        F_PAGE_SETS,
        F_MUST_TELL_HOST,
        F_DEFLATE_ON_OOM,
    ];
    let device = FakeDevice::new(&features)?;
    let mut wrong = 0;

    device.answer_all(true);
    for round in 1..=ROUNDS {
        // Another target ends the pause after an OOM.
        let size = SIZE + round * BALLOON_PAGES_PER_PAGE as u32;
        device.change(NUM_PAGES, size);
        eventually(|| Ok(device.field(ACTUAL) == size))?;

        HAS_BEGUN.store(false, Relaxed);
        let other = Thread::start(c"balloon_rs_kunit", None, || {
            HAS_BEGUN.store(true, Relaxed);
            out_of_memory();
            Ok(())
        })?;
        eventually(|| Ok(HAS_BEGUN.load(Relaxed)))?;
        let start = Instant::<Monotonic>::now();
        device.freeze()?;
        // If the task has lost the processor meanwhile, the driver does not know whether the device
        // still responds, and reports no size.
        let is_known = start.elapsed().as_millis() < i64::from(timeouts::ALIVE);
        wrong += usize::from(is_known && device.field(ACTUAL) > 0);
        eventually(|| Ok(other.outcome().is_some()))?;
        device.restore(QUEUE_SIZE)?;
    }
    Ok(wrong)
}

#[kunit_tests(virtio_balloon_rs_quiesce)]
mod tests {
    use super::*;

    #[test]
    #[cfg(CONFIG_PM_SLEEP)]
    fn a_suspend_waits_for_an_oom_notifier() {
        assert_eq!(suspend_out_of_memory(), Ok(0));
    }

    #[test]
    fn hints_are_dropped_before_the_balloon_and_the_rest_after_it() -> Result {
        let device = FakeDevice::with_callback(&FEATURES, on_kick)?;

        device.change(NUM_PAGES, SIZE);
        serve(&device, INFLATE)?;
        eventually(|| Ok(device.field(ACTUAL) == SIZE))?;
        let hinted = hint(&device)?;

        let stats = message(&device, STATS)?;
        let buffer = message(&device, REQUESTS)?;
        let mut words = [0; REQUEST_WORDS];
        words[0] = request::CANCEL.to_le();
        words[4] = 1u16.to_le();
        words[8] = 2u16.to_le();
        device.write(&buffer, &words)?;

        STATS_ID.store(stats.id(), Relaxed);
        REQUEST_ID.store(buffer.id(), Relaxed);
        STATS_KICKS.store(0, Relaxed);
        REQUEST_KICKS.store(0, Relaxed);
        let before = memory::free_pages();
        IS_DUE.store(true, Relaxed);
        // The device uses no messages.
        drop(device);

        assert!(!IS_DUE.load(Relaxed));
        assert!(FREE.load(Relaxed) > before + hinted / 2);
        assert!(STATS_KICKS.load(Relaxed) > 0);
        assert!(REQUEST_KICKS.load(Relaxed) > 0);
        Ok(())
    }
}
