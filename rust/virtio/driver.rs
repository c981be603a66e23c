// SPDX-License-Identifier: GPL-2.0

//! Virtio drivers.
//!
//! The life cycle of a device, which the [`Adapter`] controls:
//!
//! - bind: [`Driver::validate`], [`Driver::probe`], the device is made ready, [`Driver::ready`];
//! - unbind: [`Driver::quiesce`], the device is revoked, reset, and its virtqueues are deleted,
//!   [`Driver::after_reset`], the data is dropped;
//! - suspend: the same, but the data remains; resume: [`Driver::restore`], then as for bind;
//! - shutdown: [`Driver::shutdown`], the device is revoked and reset.
//!
//! "Revoked" means that every handle to the device, a [`Config`](super::Config) or a
//! [`Virtqueue`](super::Virtqueue), fails from then on in all threads, and that no thread is inside
//! one any more.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::{
    bindings,
    fs::sysfs::Attributes,
    virtio::bus::{
        binding::Binding,
        device::Device,
        feature_bit::FeatureBit,
        negotiation::Negotiation, //
    }, //
};

use core::{
    mem::offset_of,
    ptr, //
};
use kernel::{
    device,
    device_id::RawDeviceId,
    driver,
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    types::Opaque, //
};

/// An adapter for the registration of virtio drivers.
pub(crate) struct Adapter<T: Driver>(T);

/// A device with its driver `T`, in a callback of the bus.
///
/// # Invariants
///
/// `data` is the driver's data of the device, and pinned until the device has been closed.
struct DeviceAndData<'a, T: Driver> {
    dev: &'a Device<device::CoreInternal<'a>>,
    data: &'a T::Data<'a>,
}

impl<'a, T: Driver> DeviceAndData<'a, T> {
    /// Returns the device of a callback of the bus.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid for `'a`, which must not be longer than the callback runs. The callback
    /// must come between a successful `set_drvdata` in `probe_callback` and the end of
    /// `remove_callback`.
    unsafe fn new(vdev: *mut bindings::virtio_device) -> Self {
        // INVARIANT: `probe_callback` has stored a `T::Data<'_>`. The driver core drops it after
        // `remove_callback`, which closes the device.
        //
        // SAFETY: By the requirements of this function.
        unsafe {
            let dev: &Device<device::CoreInternal<'a>> = &*vdev.cast();
            let data = AsRef::<device::Device<_>>::as_ref(dev).drvdata_borrow::<T::Data<'a>>();

            Self {
                dev,
                data: data.get_ref(),
            }
        }
    }

    /// Makes the device ready, and starts the driver.
    fn make_ready(&self, binding: &Binding) {
        // SAFETY: The device is valid, and the driver has set up its virtqueues.
        unsafe { bindings::virtio_device_ready(self.dev.as_raw()) };
        binding.make_ready();

        T::ready(self.dev, self.data);
    }

    /// Ends the I/O with the device, and resets it.
    fn reset(&self) {
        T::quiesce(self.dev, self.data);
        self.dev.close();
        T::after_reset(self.dev, self.data);
    }
}

// SAFETY:
// - `bindings::virtio_driver` is a C type declared as `repr(C)`.
// - `T::Data` is the type of the driver's device private data.
// - `struct virtio_driver` embeds a `struct device_driver`.
// - `DEVICE_DRIVER_OFFSET` is the correct byte offset to the embedded `struct device_driver`.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = RawDriver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(bindings::virtio_driver, driver);
}

/// A `struct virtio_driver` that begins as zeroes.
#[repr(transparent)]
pub(crate) struct RawDriver(bindings::virtio_driver);

impl Default for RawDriver {
    fn default() -> Self {
        Self(pin_init::zeroed())
    }
}

// SAFETY: A call to `unregister` for a given instance of `DriverType` is guaranteed to be valid if
// a preceding call to `register` has been successful.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        vdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        let vdrv = vdrv.get().cast::<bindings::virtio_driver>();

        T::init()?;
        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`, whose fields may be set on
        // initialization. `FeatureBit` is a transparent `c_uint`, and there are far fewer than 2^32
        // of them.
        unsafe {
            (*vdrv).driver.name = name.as_char_ptr();
            (*vdrv).id_table = T::ID_TABLE.as_ptr();
            (*vdrv).driver.dev_groups =
                T::attributes().map_or(ptr::null_mut(), |attributes| attributes.as_ptr());
            (*vdrv).feature_table = T::FEATURES.as_ptr().cast();
            (*vdrv).feature_table_size = T::FEATURES.len() as c_uint;
            (*vdrv).validate = Some(Self::validate_callback);
            (*vdrv).probe = Some(Self::probe_callback);
            (*vdrv).remove = Some(Self::remove_callback);
            (*vdrv).config_changed = Some(Self::config_changed_callback);
            (*vdrv).freeze = Some(Self::freeze_callback);
            (*vdrv).restore = Some(Self::restore_callback);
            (*vdrv).shutdown = Some(Self::shutdown_callback);
            to_result(bindings::__register_virtio_driver(vdrv, module.as_ptr()))
        }
    }

    unsafe fn unregister(vdrv: &Opaque<Self::DriverType>) {
        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`.
        unsafe { bindings::unregister_virtio_driver(vdrv.get().cast()) };
    }
}

impl<T: Driver> Adapter<T> {
    /// # Safety
    ///
    /// Only for the virtio bus, which calls it with a valid device, and lets no other code access
    /// its features meanwhile.
    unsafe extern "C" fn validate_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // The driver does not get the device itself: `priv` may still hold a value of an earlier
        // driver.
        //
        // SAFETY: By the requirements of this function. The bus is binding the device.
        let mut features = unsafe { Negotiation::new(&*vdev.cast()) };

        from_result(|| {
            T::validate(&mut features)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Only for the virtio bus, which calls it with a valid device, and no other callback of the
    /// device meanwhile.
    unsafe extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: By the requirements of this function.
        let dev: &Device<device::CoreInternal<'_>> = unsafe { &*vdev.cast() };

        from_result(|| {
            let binding = dev.open(Self::vq_callback)?;
            let dev_ref: &device::Device<device::CoreInternal<'_>> = dev.as_ref();

            dev_ref
                .set_drvdata(T::probe(dev))
                .inspect_err(|_| dev.close())?;

            // SAFETY: By the requirements of this function; the data was just stored.
            unsafe { DeviceAndData::<T>::new(vdev) }.make_ready(&binding);
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Only for the virtio bus, as for the other callbacks below. The bus calls them with a device
    /// that `probe_callback` has bound the driver to, and that stays bound meanwhile.
    unsafe extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: By the requirements of this function.
        unsafe { DeviceAndData::<T>::new(vdev) }.reset();
    }

    /// # Safety
    ///
    /// As for `remove_callback`.
    unsafe extern "C" fn config_changed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: By the requirements of this function.
        T::config_changed(unsafe { DeviceAndData::<T>::new(vdev) }.data);
    }

    /// # Safety
    ///
    /// As for `remove_callback`.
    unsafe extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: By the requirements of this function.
        unsafe { DeviceAndData::<T>::new(vdev) }.reset();
        0
    }

    /// # Safety
    ///
    /// As for `remove_callback`.
    unsafe extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: By the requirements of this function.
        let this = unsafe { DeviceAndData::<T>::new(vdev) };

        from_result(|| {
            let binding = this.dev.open(Self::vq_callback)?;

            T::restore(this.dev, this.data).inspect_err(|_| this.dev.close())?;
            this.make_ready(&binding);
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// As for `remove_callback`.
    unsafe extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: By the requirements of this function.
        let DeviceAndData { dev, data } = unsafe { DeviceAndData::<T>::new(vdev) };

        T::shutdown(dev, data);
        dev.shut_down();
    }

    /// Passes the callback of a virtqueue on to the driver's callback for this queue. Interrupts
    /// before the device is ready are ignored.
    ///
    /// # Safety
    ///
    /// Only for the virtio core, which calls it with a queue of a device that this adapter has
    /// opened, and that was not deleted.
    unsafe extern "C" fn vq_callback(vq: *mut bindings::virtqueue) {
        // SAFETY: By the requirements of this function. `priv` is an `Arc<Binding>` from before the
        // queues are found until after they were deleted.
        let (vdev, position) = unsafe {
            let vdev = (*vq).vdev;
            let binding = (*vdev).priv_.cast::<Binding>();

            (vdev, (*binding).position((*vq).index as usize))
        };

        if let Some(callback) = position.and_then(|position| T::QUEUE_CALLBACKS.get(position)) {
            // SAFETY: The device exists as long as its queues. It has been made ready, after
            // `probe_callback` has stored the data.
            callback(unsafe { DeviceAndData::<T>::new(vdev) }.data);
        }
    }
}

/// Declares a kernel module that exposes a single virtio driver.
macro_rules! module_virtio_driver {
    ($($f:tt)*) => {
        ::kernel::module_driver!(<T>, $crate::rust::virtio::driver::Adapter<T>, { $($f)* });
    };
}
pub(crate) use module_virtio_driver;

/// Abstraction for `bindings::virtio_device_id`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// Makes an id for devices of the type `device`, of any vendor.
    pub(crate) const fn any_vendor(device: u32) -> Self {
        Self(bindings::virtio_device_id {
            device,
            vendor: bindings::VIRTIO_DEV_ANY_ID,
        })
    }

    /// Returns the type of the devices.
    pub(in crate::rust) fn device(self) -> u32 {
        self.0.device
    }
}

// SAFETY: `DeviceId` is a `#[repr(transparent)]` wrapper of `virtio_device_id` and does not add
// additional invariants, so it's safe to transmute to `RawType`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::virtio_device_id;
}

/// `IdTable` type for virtio drivers. A `struct virtio_device_id` has no place for driver data, so
/// there is no `IdInfo` to pass to [`Driver::probe`].
pub(crate) type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Creates a virtio `IdTable` with its alias for modpost.
macro_rules! virtio_device_table {
    ($name:ident, [$($id:expr),* $(,)?]) => {
        ::kernel::module_device_table!(
            "virtio", $crate::rust::virtio::driver::DeviceId, $name, @none, [$($id),*]
        );
    };
}
pub(crate) use virtio_device_table;

/// The virtio driver trait.
///
/// Drivers must implement this trait in order to get a virtio driver registered.
pub(crate) trait Driver: 'static {
    /// The type of the driver's bus device private data, which exists while the driver is bound.
    type Data<'bound>: Send + Sync + 'bound;

    /// The table of device ids supported by the driver.
    const ID_TABLE: IdTable;

    /// The features that the driver supports, apart from those of the transport.
    const FEATURES: &'static [FeatureBit];

    /// A callback for each virtqueue, in the order of the arguments of [`Device::find_vqs`]: the
    /// device has used buffers. It may be called at any time, also spuriously. Runs in interrupt
    /// context.
    const QUEUE_CALLBACKS: &'static [fn(&Self::Data<'_>)];

    /// Prepares the shared state of all devices. Called once, before any of them is probed.
    ///
    /// # Errors
    ///
    /// The driver is not registered.
    fn init() -> Result {
        Ok(())
    }

    /// The attributes of a device that the driver is bound to, if there are any.
    fn attributes() -> Option<&'static Attributes<Self::Data<'static>>> {
        None
    }

    /// Gives up offered and known features that are incompatible with other features or with this
    /// system. Called before the accepted features are written to the device.
    fn validate(_features: &mut Negotiation<'_>) -> Result {
        Ok(())
    }

    /// Virtio driver probe.
    ///
    /// Finds the virtqueues and returns an initialiser for the data. The device is not ready yet:
    /// no buffers may be made available.
    fn probe<'bound>(
        dev: &'bound Device<device::Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// The device is ready: buffers may be made available. Called after [`probe`](Self::probe) and
    /// [`restore`](Self::restore).
    fn ready<'bound>(_dev: &'bound Device<device::Core<'_>>, _data: &Self::Data<'bound>) {}

    /// The device has changed its configuration space. Runs in interrupt context.
    fn config_changed(_data: &Self::Data<'_>) {}

    /// Ends the I/O with the device, which is revoked and reset afterwards: the driver is unbound,
    /// or the system suspends.
    fn quiesce<'bound>(_dev: &'bound Device<device::Core<'_>>, _data: &Self::Data<'bound>) {}

    /// The device was reset after [`quiesce`](Self::quiesce). Frees the buffers that it still
    /// owned: after a suspend it may take long until the device is restored, or fail.
    fn after_reset<'bound>(_dev: &'bound Device<device::Core<'_>>, _data: &Self::Data<'bound>) {}

    /// Finds the virtqueues again and replaces the old ones.
    ///
    /// # Errors
    ///
    /// The device stays reset. A driver without this does not support suspend.
    fn restore<'bound>(
        _dev: &'bound Device<device::Core<'_>>,
        _data: &Self::Data<'bound>,
    ) -> Result {
        Err(ENOTSUPP)
    }

    /// Stops all work: the system shuts down. The data remains, and so does the memory.
    fn shutdown<'bound>(_dev: &'bound Device<device::Core<'_>>, _data: &Self::Data<'bound>) {}
}
