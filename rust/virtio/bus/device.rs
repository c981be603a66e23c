// SPDX-License-Identifier: GPL-2.0

//! Devices on the virtio bus.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use crate::rust::{
    bindings,
    virtio::bus::feature_bit::{
        ByteOrder,
        FeatureBit, //
    }, //
};

use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    device,
    prelude::*,
    sync::aref::AlwaysRefCounted,
    types::Opaque, //
};

/// The virtio device representation.
///
/// # Invariants
///
/// A [`Device`] instance represents a valid `struct virtio_device` created by the C portion of the
/// kernel. While a driver is bound to it, and from [`Driver::probe`] on while it binds, its `priv`
/// field is null or an `Arc<Binding>` that was made a raw pointer.
#[repr(transparent)]
pub(crate) struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    pub(in crate::rust::virtio) fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// Returns a pointer to the lower 64 feature bits.
    pub(in crate::rust::virtio) fn features(&self) -> *mut u64 {
        // The field is a union of these bits and of all bits as an array.
        self.as_raw()
            .wrapping_byte_add(offset_of!(bindings::virtio_device, __bindgen_anon_1))
            .cast()
    }

    /// Returns the device's number, which is also in its name.
    pub(in crate::rust::virtio) fn index(&self) -> u32 {
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

        // SAFETY: By the type invariants the device is valid, and on a bus. The id exists until the
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

    /// Prevents the system from suspending until [`relax`](Self::relax), if the user has enabled
    /// that for this device (`power/wakeup` in sysfs). Callable from any context.
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

impl Device<device::Bound> {
    /// Announces that the attribute `name` in `directory` has changed. May sleep.
    pub(crate) fn announce_attribute(&self, directory: &CStr, name: &CStr) {
        // SAFETY: By the type invariants the device is valid. It is bound, so its directory in
        // sysfs exists. The attribute need not exist.
        unsafe {
            bindings::sysfs_notify(
                &raw mut (*self.as_raw()).dev.kobj,
                directory.as_char_ptr(),
                name.as_char_ptr(),
            )
        };
    }
}

impl Device<device::Core<'_>> {
    /// Returns whether `feature` was negotiated.
    pub(crate) fn has_feature(&self, feature: FeatureBit) -> bool {
        // SAFETY: By the type invariants the device is valid. The features do not change while the
        // bus calls back, except in `validate`, which gets no device.
        unsafe { *self.features() & feature.mask() != 0 }
    }

    /// Returns the device's byte order in buffers.
    pub(crate) fn byte_order(&self) -> ByteOrder {
        if self.has_feature(FeatureBit::VERSION_1) {
            ByteOrder::Little
        } else {
            ByteOrder::Native
        }
    }

    /// Allows the user to enable [`stay_awake`](Self::stay_awake).
    pub(crate) fn set_wakeup_capable(&self) {
        // SAFETY: By the type invariants the device is valid.
        #[cfg(CONFIG_PM_SLEEP)]
        unsafe {
            bindings::device_set_wakeup_capable(&raw mut (*self.as_raw()).dev, true)
        };
    }
}

impl Device {
    /// Returns the device as a bound one.
    ///
    /// # Safety
    ///
    /// The device must be bound, or being bound, for as long as the result exists.
    pub(in crate::rust::virtio) unsafe fn as_bound(&self) -> &Device<device::Bound> {
        // CAST: The context is a marker.
        //
        // SAFETY: The reference is valid, and by the requirements of this function the device is
        // bound.
        unsafe { &*ptr::from_ref(self).cast() }
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
        AsRef::<device::Device>::as_ref(self).inc_ref();
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
