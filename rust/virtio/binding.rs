// SPDX-License-Identifier: GPL-2.0

//! The right to use a device, which all handles to it share and which can be revoked.
//!
//! `Devres` of the `kernel` crate does not serve here. It revokes when the driver is unbound; a
//! virtio device is also reset for suspend, on shutdown, and when it does not respond, while the
//! driver stays bound. And the driver enters with a spinlock held and from the OOM notifier, while
//! another thread revokes: a read section of SRCU costs two counters of a CPU, and may sleep.
//!
//! C header: [`include/linux/srcu.h`](srctree/include/linux/srcu.h)

use core::ptr;
use kernel::{
    new_mutex,
    new_srcu,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        srcu,
        Arc,
        Mutex,
        Srcu, //
    }, //
};

/// What there is for a device as long as it may be used, which is what the handles to it have in
/// common.
///
/// # Invariants
///
/// - While a [`srcu::Guard`] that [`enter`](Self::enter) has returned exists, the device is bound,
///   its virtqueues are there, and it was not reset since.
/// - `data` is null or points to the driver's data, of the type that `queue_used` expects. The data is
///   there until the virtqueues were deleted.
#[pin_data]
pub(crate) struct Binding {
    #[pin]
    users: Srcu,
    /// Held while the device is reset, which more than one may want.
    #[pin]
    resetting: Mutex<()>,
    state: Atomic<u32>,
    /// Which of the queues that were passed to `find_vqs` are there, one bit for each. 0 before.
    vqs: Atomic<u32>,
    data: Atomic<*mut c_void>,
    queue_used: unsafe fn(*mut c_void, usize),
    /// The device's number.
    device: u32,
}

/// The device is not ready: its configuration space may be used, and nothing else.
const SETTING_UP: u32 = 0;
/// The device may be used.
const READY: u32 = 1;
/// The device must not be used any more, but may still access the memory that it was given.
const CUT_OFF: u32 = 2;
/// The device has been reset: nothing is shared with it any more.
const RESET: u32 = 3;

// SAFETY: `data` is `Send` and `Sync` by the bounds of `Driver::Data`.
unsafe impl Send for Binding {}

// SAFETY: As above; all that changes is atomic.
unsafe impl Sync for Binding {}

impl Binding {
    /// Begins to use the device with the number `device`, which has neither virtqueues nor data yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(device: u32, queue_used: unsafe fn(*mut c_void, usize)) -> Result<Arc<Self>> {
        // INVARIANT: There are no virtqueues yet, and no data.
        Arc::pin_init(
            try_pin_init!(Self {
                users <- new_srcu!("virtio::Binding::users"),
                resetting <- new_mutex!((), "virtio::Binding::resetting"),
                state: Atomic::new(SETTING_UP),
                vqs: Atomic::new(0),
                data: Atomic::new(ptr::null_mut()),
                queue_used,
                device,
            }),
            GFP_KERNEL,
        )
    }

    /// Keeps the device usable for as long as the guard exists; `None` if it is not usable. No
    /// buffer is offered to a device, and it is not notified, before it is ready.
    ///
    /// Specification: clause 3.1.1, Driver Requirements: Device Initialization.
    pub(super) fn enter(&self) -> Option<srcu::Guard<'_>> {
        let guard = self.users.read_lock();

        (self.state.load(Acquire) == READY).then_some(guard)
    }

    /// Keeps the device's configuration space usable for as long as the guard exists; `None` if it
    /// is not.
    pub(super) fn enter_config(&self) -> Option<srcu::Guard<'_>> {
        let guard = self.users.read_lock();

        (self.state.load(Acquire) <= READY).then_some(guard)
    }

    /// Returns the device's number.
    pub(super) fn device(&self) -> u32 {
        self.device
    }

    /// Returns whether nothing is shared with the device any more.
    pub(super) fn is_reset(&self) -> bool {
        self.state.load(Acquire) == RESET
    }

    /// Lets the driver use the device, which is ready, and calls it back from now on.
    ///
    /// # Safety
    ///
    /// `data` must be the driver's data, of the type that `queue_used` expects, and must be there until
    /// the virtqueues were deleted.
    pub(super) unsafe fn make_ready(&self, data: *mut c_void) {
        self.state.store(READY, Release);
        // Pairs with the acquire in `call_back`: who sees the pointer sees the data, and may use the
        // device.
        //
        // INVARIANT: By the requirements of this function.
        self.data.store(data, Release);
    }

    /// Records the queues that `find_vqs` is about to set up, one bit for each place in what was
    /// passed to `find_vqs`, or of none (0).
    pub(super) fn set_queues(&self, present: u32) {
        self.vqs.store(present, Relaxed);
    }

    /// Returns whether there are virtqueues.
    pub(super) fn has_queues(&self) -> bool {
        self.vqs.load(Relaxed) != 0
    }

    /// Calls the driver back for the queue with the number `number`. A device that calls before it is
    /// ready is ignored.
    ///
    /// # Safety
    ///
    /// The queue must not have been deleted.
    pub(super) unsafe fn call_back(&self, number: usize) {
        // Pairs with the release in `make_ready`.
        let data = self.data.load(Acquire);

        if !data.is_null() {
            // SAFETY: By the type invariants `data` is what the function expects, and by the
            // requirements of this function it is there.
            unsafe { (self.queue_used)(data, self.position(number)) };
        }
    }

    /// Returns the position, in what was passed to `find_vqs`, of the queue with the number
    /// `number`.
    fn position(&self, number: usize) -> usize {
        let mut vqs = self.vqs.load(Relaxed);

        for _ in 0..number {
            // Clears the lowest bit.
            vqs &= vqs.wrapping_sub(1);
        }

        vqs.trailing_zeros() as usize
    }

    /// Cuts the device off: every later [`enter`](Self::enter) fails, and no reader is inside any more.
    /// Then has `reset` reset it, unless that was done before.
    pub(super) fn reset(&self, reset: impl FnOnce()) {
        let _one = self.resetting.lock();

        if !self.is_reset() {
            self.state.store(CUT_OFF, Release);
            self.users.synchronize_expedited();
            reset();
            self.state.store(RESET, Release);
        }
    }
}
