// SPDX-License-Identifier: GPL-2.0

//! Devices on the virtio bus.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use crate::rust::{
    bindings,
    virtio::{
        binding::Binding,
        feature::{
            ByteOrder,
            Feature, //
        },
        transport::{
            features_of,
            reset_by, //
        }, //
    }, //
};

use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    device,
    prelude::*,
    sync::{
        aref::AlwaysRefCounted,
        Arc,
        ArcBorrow, //
    },
    types::Opaque, //
};

/// The virtio device representation.
///
/// # Invariants
///
/// A [`Device`] instance represents a valid `struct virtio_device` created by the C portion of the
/// kernel. While a driver is bound to it, and from [`Driver::probe`] on while it binds, its `priv`
/// field is null or an [`Arc<Binding>`] that was made a raw pointer.
#[repr(transparent)]
pub(crate) struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    pub(super) fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// Returns the device's number, which is also in its name.
    pub(super) fn index(&self) -> u32 {
        // SAFETY: By the type invariants the device is valid. Its number does not change.
        unsafe { (*self.as_raw()).index as u32 }
    }

    /// Returns whether there is a device of the type `id` on the bus.
    pub(crate) fn bus_has_device(&self, id: u32) -> bool {
        /// # Safety
        ///
        /// `dev` must be a device on the bus, and `id` point to a `u32`.
        unsafe extern "C" fn has_id(dev: *mut bindings::device, id: *mut c_void) -> c_int {
            // SAFETY: By the requirements of this function.
            unsafe {
                let dev = kernel::container_of!(dev, bindings::virtio_device, dev);

                ((*dev).id.device == *id.cast::<u32>()).into()
            }
        }
        let mut id = id;

        // SAFETY: By the type invariants the device is valid, and on a bus. The id is there until the
        // function returns.
        unsafe {
            bindings::bus_for_each_dev(
                (*self.as_raw()).dev.bus,
                ptr::null_mut(),
                (&raw mut id).cast(),
                Some(has_id),
            ) != 0
        }
    }

    /// Announces that the attribute `name` in `directory` has changed. May sleep.
    pub(crate) fn announce_attribute(&self, directory: &CStr, name: &CStr) {
        // SAFETY: By the type invariants the device is valid. There need not be such an attribute.
        unsafe {
            bindings::sysfs_notify(
                &raw mut (*self.as_raw()).dev.kobj,
                directory.as_char_ptr(),
                name.as_char_ptr(),
            )
        };
    }

    /// Keeps the system from suspending until [`relax`](Self::relax), if the user wants that of
    /// this device (`power/wakeup` in sysfs). Callable from any context.
    pub(crate) fn stay_awake(&self) {
        #[cfg(CONFIG_PM_SLEEP)]
        // SAFETY: By the type invariants the device is valid.
        unsafe {
            bindings::pm_stay_awake(&raw mut (*self.as_raw()).dev)
        };
    }

    /// Takes [`stay_awake`](Self::stay_awake) back, however often it was called.
    pub(crate) fn relax(&self) {
        #[cfg(CONFIG_PM_SLEEP)]
        // SAFETY: By the type invariants the device is valid.
        unsafe {
            bindings::pm_relax(&raw mut (*self.as_raw()).dev)
        };
    }
}

impl Device<device::CoreInternal<'_>> {
    /// Begins to use the device. The result is the binding that all handles will share.
    pub(super) fn open(&self, queue_used: unsafe fn(*mut c_void, usize)) -> Result<Arc<Binding>> {
        let binding = Binding::new(self.index(), queue_used)?;

        // SAFETY: By the type invariants the device is valid, and `priv` is for its driver to use,
        // which is this layer.
        unsafe { (*self.as_raw()).priv_ = Arc::into_raw(binding.clone()).cast_mut().cast() };

        Ok(binding)
    }

    /// Ends the use of the device: cuts it off, resets it and deletes its virtqueues.
    pub(super) fn close(&self) {
        // SAFETY: By the type invariants the device is valid. One callback of the bus at a time resets
        // it, and threads that do so are waited for.
        let reset = || unsafe { reset_by(bindings::virtio_reset_device, self.as_raw()) };

        let Some(binding) = self.binding() else {
            // A device that could not be restored has been closed before.
            return reset();
        };

        binding.reset(reset);

        // SAFETY: By the type invariants the device is valid and was reset. The queues are used only
        // through the binding. `priv` is an `Arc<Binding>`, which is taken back here: interrupts,
        // which look at it, end with the virtqueues.
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

    /// Ends the use of the device for shutdown: cuts it off and resets it. Its virtqueues stay, since
    /// interrupts may still be on their way.
    pub(super) fn shut_down(&self) {
        if let Some(binding) = self.binding() {
            // SAFETY: By the type invariants the device is valid. One thread at a time resets it.
            binding.reset(|| unsafe {
                reset_by(bindings::virtio_device_shutdown, self.as_raw());
            });
        }
    }
}

impl Device<device::Core<'_>> {
    /// Returns whether `feature` was negotiated.
    pub(crate) fn has_feature(&self, feature: Feature) -> bool {
        // SAFETY: By the type invariants the device is valid. The features do not change while the
        // bus calls back, except in `validate`, which gets no device.
        unsafe { *features_of(self.as_raw()) & feature.mask() != 0 }
    }

    /// Returns the byte order of what the device reads in buffers.
    pub(crate) fn byte_order(&self) -> ByteOrder {
        if self.has_feature(Feature::VERSION_1) {
            ByteOrder::Little
        } else {
            ByteOrder::Native
        }
    }

    /// Returns the binding, or none before [`open`](Device::open) and after [`close`](Device::close).
    pub(super) fn binding(&self) -> Option<Arc<Binding>> {
        // SAFETY: By the type invariants `priv` is null or from `Arc::into_raw`. It changes only in
        // other callbacks of the bus, which come one after the other.
        unsafe {
            let binding: *const Binding = (*self.as_raw()).priv_.cast();

            (!binding.is_null()).then(|| ArcBorrow::from_raw(binding).into())
        }
    }

    /// Lets the user decide whether [`stay_awake`](Self::stay_awake) has an effect.
    pub(crate) fn set_wakeup_capable(&self) {
        // SAFETY: By the type invariants the device is valid.
        #[cfg(CONFIG_PM_SLEEP)]
        unsafe {
            bindings::device_set_wakeup_capable(&raw mut (*self.as_raw()).dev, true)
        };
    }
}

// SAFETY: `virtio::Device` is a transparent wrapper of `struct virtio_device`.
// The offset is guaranteed to point to a valid device field inside `virtio::Device`.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::virtio_device, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on `Device`'s generic
// argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: Instances of `Device` are always reference-counted.
unsafe impl AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: The existence of a shared reference guarantees that the refcount is non-zero.
        unsafe { bindings::get_device(&raw mut (*self.as_raw()).dev) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The safety requirements guarantee that the refcount is non-zero.
        unsafe {
            bindings::put_device(&raw mut (*obj.cast::<bindings::virtio_device>().as_ptr()).dev)
        };
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant of `Self`, `self.as_raw()` is a pointer to a valid
        // `struct virtio_device`, and so is the `struct device` in it.
        unsafe { device::Device::from_raw(&raw mut (*self.as_raw()).dev) }
    }
}

// SAFETY: A `Device` is always reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: `Device` can be shared among threads because all methods of `Device`
// (i.e. `Device<Normal>`) are thread safe.
unsafe impl Sync for Device {}
