// SPDX-License-Identifier: GPL-2.0

//! The revocable right to use a device, which all handles to it share.
//!
//! I/O needs a [`Device<Bound>`]. A callback of the bus has one. A handle has one while it is
//! inside the binding, as [`Entered`].
//!
//! `Devres` of the `kernel` crate does not fit here. It revokes when the driver is unbound. A
//! virtio device is also reset for suspend, on shutdown, and when it does not respond, while the
//! driver stays bound. And the driver enters with a spinlock held and from the OOM notifier, while
//! another thread revokes. Neither does `Revocable`: its read sections must not sleep, and those of
//! the driver do. An SRCU read section costs two per-CPU counters, and may sleep.
//!
//! C header: [`include/linux/srcu.h`](srctree/include/linux/srcu.h)

use crate::rust::{
    bindings,
    virtio::bus::device::Device, //
};

use core::{
    ops::Deref,
    ptr, //
};
use kernel::{
    device::{
        Bound,
        Core,
        CoreInternal, //
    },
    new_mutex,
    new_srcu,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        srcu,
        Arc,
        ArcBorrow,
        Mutex,
        Srcu, //
    }, //
};

/// The shared state of all handles to a device, while the device may be used.
///
/// # Invariants
///
/// - `dev` is bound, or is being bound, until the state is [`RESET`].
/// - While an [`Entered`] from [`enter`](Self::enter) exists, the virtqueues of the device exist,
///   and it was not reset since.
#[pin_data]
pub(crate) struct Binding {
    #[pin]
    users: Srcu,
    /// Held while the device is reset, since several threads may reset it.
    #[pin]
    resetting: Mutex<()>,
    state: Atomic<u32>,
    /// Which of the queues of `find_vqs` exist, one bit for each. 0 before.
    vqs: Atomic<u32>,
    vq_callback: VqCallback,
    dev: ARef<Device>,
}

/// The callback of all virtqueues of a device, for the virtio core. Its argument is a queue that
/// [`Device::find_vqs`] has set up, and that was not deleted.
pub(in crate::rust::virtio) type VqCallback = unsafe extern "C" fn(*mut bindings::virtqueue);

/// A device, which stays bound as long as this exists.
///
/// # Invariants
///
/// `dev` is that of a [`Binding`] whose state was not [`RESET`] when `_guard` was taken.
pub(in crate::rust::virtio) struct Entered<'a> {
    dev: &'a Device,
    _guard: srcu::Guard<'a>,
}

impl Deref for Entered<'_> {
    type Target = Device<Bound>;

    fn deref(&self) -> &Device<Bound> {
        // SAFETY: By the type invariants, and those of `Binding`: a reset of the device waits for
        // the guard.
        unsafe { self.dev.as_bound() }
    }
}

/// How a device is reset.
#[derive(Clone, Copy)]
pub(in crate::rust::virtio) enum Reset {
    /// For the next driver, or for further use.
    Restart,
    /// For a shutdown of the system.
    Shutdown,
}

/// The device is not ready: its configuration space may be used, and nothing else.
const SETTING_UP: u32 = 0;
/// The device may be used.
const READY: u32 = 1;
/// The device must not be used any more, but may still access its buffers.
const REVOKED: u32 = 2;
/// The device has been reset: it owns no buffers any more.
const RESET: u32 = 3;

impl Binding {
    /// Begins to use the device, which has no virtqueues yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new(dev: &Device<CoreInternal<'_>>, vq_callback: VqCallback) -> Result<Arc<Self>> {
        // INVARIANT: A callback of the bus binds the device. There are no virtqueues yet.
        Arc::pin_init(
            try_pin_init!(Self {
                users <- new_srcu!("virtio::Binding::users"),
                resetting <- new_mutex!((), "virtio::Binding::resetting"),
                state: Atomic::new(SETTING_UP),
                vqs: Atomic::new(0),
                vq_callback,
                dev: dev.into(),
            }),
            GFP_KERNEL,
        )
    }

    /// Keeps the device usable for as long as the result exists; `None` if it is not usable. Before
    /// the device is ready, no buffer is made available to it, and it is not notified.
    ///
    /// Specification: clause 3.1.1, Driver Requirements: Device Initialization.
    pub(in crate::rust::virtio) fn enter(&self) -> Option<Entered<'_>> {
        self.enter_if(|state| state == READY)
    }

    /// Keeps the device's configuration space usable for as long as the result exists; `None` if it
    /// is not.
    pub(in crate::rust::virtio) fn enter_config(&self) -> Option<Entered<'_>> {
        self.enter_if(|state| state <= READY)
    }

    fn enter_if(&self, is_open: impl FnOnce(u32) -> bool) -> Option<Entered<'_>> {
        let guard = self.users.read_lock();

        // INVARIANT: The state is not `RESET`, which is above `READY`.
        is_open(self.state.load(Acquire)).then_some(Entered {
            dev: &self.dev,
            _guard: guard,
        })
    }

    /// Returns the device's number.
    pub(in crate::rust::virtio) fn device(&self) -> u32 {
        self.dev.index()
    }

    /// Returns whether the device was reset, and owns no buffers.
    pub(in crate::rust::virtio) fn is_reset(&self) -> bool {
        self.state.load(Acquire) == RESET
    }

    /// Allows the driver to use the ready device, and enables callbacks. The driver's data must
    /// have been stored.
    pub(in crate::rust::virtio) fn make_ready(&self) {
        // Pairs with the acquire in `position`.
        self.state.store(READY, Release);
    }

    /// Records the queues that `find_vqs` is about to set up, one bit for each of its arguments, or
    /// none (0).
    pub(in crate::rust::virtio) fn set_queues(&self, present: u32) {
        self.vqs.store(present, Relaxed);
    }

    /// Returns whether there are virtqueues.
    pub(in crate::rust::virtio) fn has_queues(&self) -> bool {
        self.vqs.load(Relaxed) != 0
    }

    /// Returns the callback of all virtqueues.
    pub(in crate::rust::virtio) fn vq_callback(&self) -> VqCallback {
        self.vq_callback
    }

    /// Returns the position, in the arguments of `find_vqs`, of the queue with the number `number`;
    /// `None` before the device is ready.
    pub(in crate::rust::virtio) fn position(&self, number: usize) -> Option<usize> {
        // Pairs with the release in `make_ready`: a thread that sees the state sees the driver's
        // data.
        if self.state.load(Acquire) == SETTING_UP {
            return None;
        }
        let mut vqs = self.vqs.load(Relaxed);

        for _ in 0..number {
            // Clears the lowest bit.
            vqs &= vqs.wrapping_sub(1);
        }

        Some(vqs.trailing_zeros() as usize)
    }

    /// Revokes the device: every later [`enter`](Self::enter) fails, and no reader is inside any
    /// more. Then resets it, unless it was reset before.
    pub(in crate::rust::virtio) fn reset(&self, how: Reset) {
        let _one = self.resetting.lock();

        if !self.is_reset() {
            self.state.store(REVOKED, Release);
            self.users.synchronize_expedited();
            // SAFETY: By the type invariants the device is bound. One thread at a time has the
            // lock.
            unsafe { reset(self.dev.as_bound(), how) };
            self.state.store(RESET, Release);
        }
    }
}

/// Resets a device.
///
/// # Safety
///
/// Only one thread may reset it.
unsafe fn reset(dev: &Device<Bound>, how: Reset) {
    let by = match how {
        Reset::Restart => bindings::virtio_reset_device,
        Reset::Shutdown => bindings::virtio_device_shutdown,
    };

    // SAFETY: These functions reset the device, and only one thread does so by the requirements of
    // this function.
    unsafe { dev.reset_by(by) };
}

impl Device<CoreInternal<'_>> {
    /// Begins to use the device. Returns the binding that all handles will share.
    pub(in crate::rust::virtio) fn open(&self, vq_callback: VqCallback) -> Result<Arc<Binding>> {
        let binding = Binding::new(self, vq_callback)?;

        // SAFETY: By the type invariants the device is valid, and `priv` belongs to its driver,
        // which is this layer.
        unsafe { (*self.as_raw()).priv_ = Arc::into_raw(binding.clone()).cast_mut().cast() };

        Ok(binding)
    }

    /// Ends the use of the device: revokes it, resets it and deletes its virtqueues.
    pub(in crate::rust::virtio) fn close(&self) {
        let Some(binding) = self.binding() else {
            // A device that could not be restored has been closed before.
            //
            // SAFETY: One callback of the bus at a time resets it, and no other thread uses it.
            return unsafe { reset(self, Reset::Restart) };
        };

        binding.reset(Reset::Restart);

        // SAFETY: By the type invariants the device is valid and was reset. The queues are used
        // only through the binding. `priv` is an `Arc<Binding>`, which is taken back here:
        // interrupts, which read it, end with the virtqueues.
        unsafe {
            let del_vqs = (*(*self.as_raw()).config).del_vqs;
            if let Some(del_vqs) = del_vqs.filter(|_| binding.has_queues()) {
                del_vqs(self.as_raw());
            }
            let binding: *const Binding = (*self.as_raw()).priv_.cast();

            (*self.as_raw()).priv_ = ptr::null_mut();
            drop(Arc::from_raw(binding));
        }
    }

    /// Ends the use of the device for shutdown: revokes it and resets it. Its virtqueues stay,
    /// since interrupts may still be pending.
    pub(in crate::rust::virtio) fn shut_down(&self) {
        if let Some(binding) = self.binding() {
            binding.reset(Reset::Shutdown);
        }
    }
}

/// A handle to a device, which works until the device is unbound or reset.
pub(crate) struct Handle(Arc<Binding>);

impl Handle {
    /// Calls `work` with the device, which stays bound meanwhile. Returns none if the device is
    /// gone.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&Device<Bound>) -> R) -> Option<R> {
        self.0.enter_config().map(|dev| work(&dev))
    }
}

impl Device<Core<'_>> {
    /// Returns a handle to the device.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone.
    pub(crate) fn handle(&self) -> Result<Handle> {
        self.binding().map(Handle).ok_or(ENODEV)
    }

    /// Returns the binding, or none before [`open`](Device::open) and after
    /// [`close`](Device::close).
    pub(in crate::rust::virtio) fn binding(&self) -> Option<Arc<Binding>> {
        // SAFETY: By the type invariants `priv` is null or from `Arc::into_raw`. It changes only in
        // other callbacks of the bus, which come one after the other.
        unsafe {
            let binding: *const Binding = (*self.as_raw()).priv_.cast();

            (!binding.is_null()).then(|| ArcBorrow::from_raw(binding).into())
        }
    }
}
