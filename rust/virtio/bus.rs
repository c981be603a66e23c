// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the virtio bus.
//!
//! The life of a device, which the [`Adapter`] conducts and no driver has to think of:
//!
//! - bind: [`Driver::validate`], [`Driver::probe`], the device is made ready, [`Driver::ready`];
//! - unbind: [`Driver::unbind`], the device is cut off, reset, and its virtqueues are deleted;
//! - suspend: [`Driver::freeze`], then as for unbind; resume: [`Driver::restore`], then as for
//!   bind;
//! - shutdown: [`Driver::shutdown`], the device is cut off and reset.
//!
//! "Cut off" means that every handle to the device, be it a [`Config`] or a [`Virtqueue`], in
//! whatever thread, fails from then on, and that nobody is inside of one any more.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::{
    bindings,
    fs::sysfs::Attributes,
    virtio::virtqueue::{
        Traffic,
        Virtqueue, //
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
    device_id::RawDeviceId,
    driver,
    error::{
        from_result,
        to_result, //
    },
    new_mutex,
    new_srcu,
    prelude::*,
    sync::{
        aref::{
            ARef,
            AlwaysRefCounted, //
        },
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
    },
    types::Opaque, //
};

/// An adapter for the registration of virtio drivers.
pub(crate) struct Adapter<T: Driver>(T);

// SAFETY:
// - `bindings::virtio_driver` is a C type declared as `repr(C)`.
// - `T::Data` is the type of the driver's device private data.
// - `struct virtio_driver` embeds a `struct device_driver`.
// - `DEVICE_DRIVER_OFFSET` is the correct byte offset to the embedded `struct device_driver`.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = RawDriver;
    type DriverData<'bound> = T::Data;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(bindings::virtio_driver, driver);
}

/// A `struct virtio_driver` that begins as zeroes.
#[repr(transparent)]
pub(crate) struct RawDriver(bindings::virtio_driver);

impl Default for RawDriver {
    fn default() -> Self {
        // SAFETY: The struct consists of integers and of pointers that may be null.
        Self(unsafe { core::mem::zeroed() })
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

        // SAFETY: It's safe to set the fields of `struct virtio_driver` on initialization.
        // `Feature` is a transparent `c_uint`, and there are far fewer than 2^32 of them.
        unsafe {
            (*vdrv).driver.name = name.as_char_ptr();
            (*vdrv).id_table = T::ID_TABLE.as_ptr();
            (*vdrv).driver.dev_groups = T::attributes().as_ptr();
            (*vdrv).feature_table = T::FEATURES.as_ptr().cast();
            (*vdrv).feature_table_size = T::FEATURES.len() as c_uint;
            (*vdrv).validate = Some(Self::validate_callback);
            (*vdrv).probe = Some(Self::probe_callback);
            (*vdrv).remove = Some(Self::remove_callback);
            (*vdrv).config_changed = Some(Self::config_changed_callback);
            (*vdrv).freeze = Some(Self::freeze_callback);
            (*vdrv).restore = Some(Self::restore_callback);
            (*vdrv).shutdown = Some(Self::shutdown_callback);
        }

        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`.
        to_result(unsafe { bindings::__register_virtio_driver(vdrv, module.as_ptr()) })
    }

    unsafe fn unregister(vdrv: &Opaque<Self::DriverType>) {
        // SAFETY: `vdrv` is guaranteed to be a valid `DriverType`.
        unsafe { bindings::unregister_virtio_driver(vdrv.get().cast()) };
    }
}

impl<T: Driver> Adapter<T> {
    /// Returns the device of a bus callback.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid for `'a`, which must not be longer than the callback runs.
    unsafe fn device<'a>(
        vdev: *mut bindings::virtio_device,
    ) -> &'a Device<device::CoreInternal<'a>> {
        // SAFETY: By the requirements of this function.
        unsafe { &*vdev.cast() }
    }

    /// Returns the driver's data of a device that is bound.
    ///
    /// # Safety
    ///
    /// [`device::Device::set_drvdata`] must have succeeded for the device, which must not be
    /// unbound completely yet.
    unsafe fn data<'a>(dev: &'a Device<device::CoreInternal<'_>>) -> &'a T::Data {
        // SAFETY: By the requirements of this function; `T::Data` is what `probe_callback` has
        // stored.
        unsafe { AsRef::<device::Device<_>>::as_ref(dev).drvdata_borrow::<T::Data>() }.get_ref()
    }

    /// Makes the device live, and lets the driver begin.
    fn make_ready(dev: &Device<device::CoreInternal<'_>>, binding: &Binding, data: &T::Data) {
        // SAFETY: The device is valid, and the driver has set its virtqueues up.
        unsafe { bindings::balloon_rs_virtio_device_ready(dev.as_raw()) };
        binding.state.store(READY, Release);

        // Pairs with the acquire in `vq_callback`: who sees the pointer sees the data, and may use
        // the device.
        binding.data.store(
            ptr::from_ref(data).cast_mut().cast(),
            Release, //
        );

        T::ready(dev, data);
    }

    extern "C" fn validate_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // The device itself stays out of this: what another driver has left in `priv` is still there.
        //
        // INVARIANT: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`, and has the features to itself until the driver is probed.
        let mut features = Features {
            vdev,
            _life: PhantomData,
        };

        from_result(|| {
            T::validate(&mut features)?;
            Ok(0)
        })
    }

    extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };

        from_result(|| {
            let binding = dev.open(Self::queue_used)?;
            let dev_ref: &device::Device<device::CoreInternal<'_>> = dev.as_ref();

            dev_ref
                .set_drvdata(T::probe(dev))
                .inspect_err(|_| dev.close())?;

            // SAFETY: The driver's data was just stored.
            Self::make_ready(dev, &binding, unsafe { Self::data(dev) });
            Ok(0)
        })
    }

    extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };

        // SAFETY: `remove_callback` is only ever called after a successful call to
        // `probe_callback`.
        T::unbind(dev, unsafe { Self::data(dev) });
        dev.close();
    }

    extern "C" fn config_changed_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };

        // SAFETY: The virtio core passes configuration changes on only after a successful call to
        // `probe_callback` and before `remove_callback`.
        T::config_changed(unsafe { Self::data(dev) });
    }

    extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };

        // SAFETY: `freeze_callback` is only ever called for a bound device.
        let data = unsafe { Self::data(dev) };

        T::freeze(dev, data);
        dev.close();
        T::frozen(data);
        0
    }

    extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };
        // SAFETY: `restore_callback` is only ever called for a bound device.
        let data = unsafe { Self::data(dev) };

        from_result(|| {
            let binding = dev.open(Self::queue_used)?;

            T::restore(dev, data).inspect_err(|_| dev.close())?;
            Self::make_ready(dev, &binding, data);
            Ok(0)
        })
    }

    extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The virtio bus only ever calls back with a valid pointer to a `struct
        // virtio_device`.
        let dev = unsafe { Self::device(vdev) };

        // SAFETY: `shutdown_callback` is only ever called for a bound device.
        T::shutdown(dev, unsafe { Self::data(dev) });

        if let Some(binding) = dev.binding() {
            // SAFETY: The device is valid. The virtqueues stay: interrupts may still be on their
            // way.
            binding.reset(|| unsafe { bindings::balloon_rs_shut_device_down(vdev) });
        }
    }

    /// Passes the callback of a virtqueue on.
    ///
    /// # Safety
    ///
    /// `data` must be a pointer to the driver's data, as stored in [`Binding::data`].
    unsafe fn queue_used(data: *mut c_void, index: usize) {
        // SAFETY: By the requirements of this function.
        let data = unsafe { &*data.cast::<T::Data>() };

        T::queue_used(data, index);
    }
}

/// Declares a kernel module that exposes a single virtio driver.
macro_rules! module_virtio_driver {
    ($($f:tt)*) => {
        ::kernel::module_driver!(<T>, $crate::rust::virtio::Adapter<T>, { $($f)* });
    };
}
pub(crate) use module_virtio_driver;

/// Abstraction for `bindings::virtio_device_id`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// The memory balloon of any vendor.
    pub(crate) const BALLOON: Self = Self(bindings::virtio_device_id {
        device: bindings::VIRTIO_ID_BALLOON,
        vendor: bindings::VIRTIO_DEV_ANY_ID,
    });
}

// SAFETY: `DeviceId` is a `#[repr(transparent)]` wrapper of `virtio_device_id` and does not add
// additional invariants, so it's safe to transmute to `RawType`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::virtio_device_id;
}

/// `IdTable` type for virtio drivers.
pub(crate) type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// Creates a virtio `IdTable` with its alias for modpost.
macro_rules! virtio_device_table {
    ($name:ident, [$($id:expr),* $(,)?]) => {
        ::kernel::module_device_table!("virtio", $crate::rust::virtio::DeviceId, $name, @none, [$($id),*]);
    };
}
pub(crate) use virtio_device_table;

/// A feature bit.
///
/// # Invariants
///
/// The bit number is below 64.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Feature(c_uint);

impl Feature {
    /// The device complies with version 1 of the specification; a legacy device does not.
    pub(crate) const VERSION_1: Self = Self::new::<{ bindings::VIRTIO_F_VERSION_1 }>();
    /// The device reads and writes memory through an IOMMU or a platform that it must not go round.
    pub(crate) const ACCESS_PLATFORM: Self = Self::new::<{ bindings::VIRTIO_F_ACCESS_PLATFORM }>();
    /// A buffer may consist of several parts that are listed in memory of their own.
    pub(crate) const INDIRECT_DESC: Self = Self::new::<{ bindings::VIRTIO_RING_F_INDIRECT_DESC }>();

    /// Makes a feature of its bit number. One above 63 does not compile.
    pub(in crate::rust) const fn new<const BIT: c_uint>() -> Self {
        const { assert!(BIT < u64::BITS) };
        // INVARIANT: It was just checked.
        Self(BIT)
    }

    /// Returns a word with this bit set.
    pub(in crate::rust) const fn mask(self) -> u64 {
        1u64.wrapping_shl(self.0)
    }
}

/// The features of a device while they are negotiated, for [`Driver::validate`].
///
/// # Invariants
///
/// `vdev` is a valid device, whose features no other code accesses for `'a`.
pub(crate) struct Features<'a> {
    vdev: *mut bindings::virtio_device,
    _life: PhantomData<&'a mut bindings::virtio_device>,
}

impl Features<'_> {
    /// Returns whether the device offers `feature`, and the driver knows it and has not given it up.
    pub(crate) fn has(&self, feature: Feature) -> bool {
        // SAFETY: By the type invariants.
        unsafe { *features_of(self.vdev) & feature.mask() != 0 }
    }

    /// Gives `feature` up.
    pub(crate) fn clear(&mut self, feature: Feature) {
        // SAFETY: By the type invariants.
        unsafe { *features_of(self.vdev) &= !feature.mask() };
    }

    /// Returns whether the configuration space is long enough to have `field`.
    pub(crate) fn have_field(&self, field: Field<u32>) -> bool {
        // SAFETY: By the type invariants the device is valid.
        field.is_within(unsafe { bindings::balloon_rs_config_len(self.vdev) })
    }
}

impl AsRef<device::Device> for Features<'_> {
    /// Returns the device, for the log.
    fn as_ref(&self) -> &device::Device {
        // SAFETY: By the type invariants the device is valid, and so is the `struct device` in it.
        unsafe { device::Device::from_raw(&raw mut (*self.vdev).dev) }
    }
}

/// Returns a pointer to the lower 64 feature bits of a device.
///
/// # Safety
///
/// `vdev` must be a valid device.
unsafe fn features_of(vdev: *mut bindings::virtio_device) -> *mut u64 {
    // SAFETY: By the requirements of this function. The field is a union of these bits and of all
    // bits as an array.
    unsafe { (&raw mut (*vdev).__bindgen_anon_1).cast() }
}

/// The byte order of what a device reads in buffers: little-endian, unless the device is a legacy
/// one.
#[derive(Clone, Copy)]
pub(crate) enum ByteOrder {
    /// Little-endian.
    Little,
    /// The guest's own.
    Native,
}

impl ByteOrder {
    /// Returns `value` in this byte order.
    pub(crate) fn to_device16(self, value: u16) -> u16 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }

    /// Returns `value` in this byte order.
    pub(crate) fn to_device32(self, value: u32) -> u32 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }

    /// Returns `value` in this byte order.
    pub(crate) fn to_device64(self, value: u64) -> u64 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }
}

/// The virtio driver trait.
///
/// Drivers must implement this trait in order to get a virtio driver registered.
pub(crate) trait Driver {
    /// The type of the driver's bus device private data.
    type Data: Send + Sync + 'static;

    /// The table of device ids supported by the driver.
    const ID_TABLE: IdTable;

    /// The features that the driver knows, apart from those of the transport.
    const FEATURES: &'static [Feature];

    /// The attributes of a device that the driver is bound to.
    fn attributes() -> &'static Attributes<Self::Data>;

    /// Gives features up that were offered and are known, but do not go together with the others or
    /// with this system. Called before the device is told which features are accepted.
    fn validate(features: &mut Features<'_>) -> Result;

    /// Virtio driver probe.
    ///
    /// Finds the virtqueues and sets the data up. The device is not ready yet and must not be told
    /// of buffers.
    fn probe(dev: &Device<device::Core<'_>>) -> Result<Self::Data>;

    /// The device is ready: buffers may be offered. Called after [`probe`](Self::probe) and
    /// [`restore`](Self::restore).
    fn ready(dev: &Device<device::Core<'_>>, data: &Self::Data);

    /// The device has used buffers of the virtqueue with index `index` in what was passed to
    /// [`Device::find_vqs`]. It may call at any time, also without reason. Runs in interrupt
    /// context.
    fn queue_used(data: &Self::Data, index: usize);

    /// The device has changed its configuration space. Runs in interrupt context.
    fn config_changed(data: &Self::Data);

    /// Virtio driver unbind.
    ///
    /// Takes leave of the device, which is cut off and reset afterwards. Everything else is
    /// released when the data is dropped.
    fn unbind(dev: &Device<device::Core<'_>>, data: &Self::Data);

    /// Like [`unbind`](Self::unbind), but the data remains.
    fn freeze(dev: &Device<device::Core<'_>>, data: &Self::Data);

    /// The device was reset after [`freeze`](Self::freeze). What it still had is given back: it may
    /// be long until it is restored, if it can be.
    fn frozen(data: &Self::Data);

    /// Finds the virtqueues again and puts them where the old ones are.
    fn restore(dev: &Device<device::Core<'_>>, data: &Self::Data) -> Result;

    /// Stops what is going on: the system goes down. The data remains, and so does the memory.
    fn shutdown(dev: &Device<device::Core<'_>>, data: &Self::Data);
}

/// What there is for a device as long as it may be used, which is what the handles to it have in
/// common.
///
/// # Invariants
///
/// - While a [`srcu::Guard`] that [`enter`](Self::enter) has returned exists, the device is bound,
///   its virtqueues are there, and it was not reset since.
/// - `data` is null or points to the driver's data, of the type that `queue_used` expects.
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
    /// Keeps the device usable for as long as the guard exists; `None` if it is not usable. No
    /// buffer is offered to a device, and it is not notified, before it is ready.
    ///
    /// Specification: clause 3.1.1, Driver Requirements: Device Initialization.
    pub(in crate::rust) fn enter(&self) -> Option<srcu::Guard<'_>> {
        let guard = self.users.read_lock();

        (self.state.load(Acquire) == READY).then_some(guard)
    }

    /// Keeps the device's configuration space usable for as long as the guard exists; `None` if it
    /// is not.
    fn enter_config(&self) -> Option<srcu::Guard<'_>> {
        let guard = self.users.read_lock();

        (self.state.load(Acquire) <= READY).then_some(guard)
    }

    /// Returns the device's number.
    pub(in crate::rust) fn device(&self) -> u32 {
        self.device
    }

    /// Returns whether nothing is shared with the device any more.
    pub(in crate::rust) fn is_reset(&self) -> bool {
        self.state.load(Acquire) == RESET
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

    /// Cuts the device off: every later [`enter`](Self::enter) fails, and nobody is inside any more.
    /// Then has `reset` reset it, unless that was done before.
    pub(in crate::rust) fn reset(&self, reset: impl FnOnce()) {
        let _one = self.resetting.lock();

        if !self.is_reset() {
            self.state.store(CUT_OFF, Release);
            self.users.synchronize_expedited();
            reset();
            self.state.store(RESET, Release);
        }
    }
}

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
    fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// Returns the device's number, which is also in its name.
    fn index(&self) -> u32 {
        // SAFETY: By the type invariants the device is valid. Its number does not change.
        unsafe { (*self.as_raw()).index as u32 }
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
    pub(in crate::rust) fn stay_awake(&self) {
        // SAFETY: By the type invariants the device is valid.
        unsafe { bindings::balloon_rs_stay_awake(self.as_raw()) };
    }

    /// Takes [`stay_awake`](Self::stay_awake) back, however often it was called.
    pub(in crate::rust) fn relax(&self) {
        // SAFETY: By the type invariants the device is valid.
        unsafe { bindings::balloon_rs_relax(self.as_raw()) };
    }
}

impl Device<device::CoreInternal<'_>> {
    /// Begins to use the device. The result is the binding that all handles will share.
    fn open(&self, queue_used: unsafe fn(*mut c_void, usize)) -> Result<Arc<Binding>> {
        // INVARIANT: There are no virtqueues yet, and no data.
        let binding = Arc::pin_init(
            try_pin_init!(Binding {
                users <- new_srcu!("virtio::Binding::users"),
                resetting <- new_mutex!((), "virtio::Binding::resetting"),
                state: Atomic::new(SETTING_UP),
                vqs: Atomic::new(0),
                data: Atomic::new(ptr::null_mut()),
                queue_used,
                device: self.index(),
            }),
            GFP_KERNEL,
        )?;

        // SAFETY: By the type invariants the device is valid, and `priv` is for its driver to use,
        // which is this layer.
        unsafe { (*self.as_raw()).priv_ = Arc::into_raw(binding.clone()).cast_mut().cast() };

        Ok(binding)
    }

    /// Ends the use of the device: cuts it off, resets it and deletes its virtqueues.
    fn close(&self) {
        // SAFETY: By the type invariants the device is valid.
        let reset = || unsafe { bindings::balloon_rs_reset_device(self.as_raw()) };

        let Some(binding) = self.binding() else {
            // A device that could not be restored has been closed before.
            return reset();
        };

        binding.reset(reset);

        if binding.vqs.load(Relaxed) != 0 {
            // SAFETY: By the type invariants the device is valid and was reset. The queues are used
            // only through the binding.
            unsafe {
                if let Some(del_vqs) = (*(*self.as_raw()).config).del_vqs {
                    del_vqs(self.as_raw());
                }
            }
        }

        // SAFETY: By the type invariants `priv` is an `Arc<Binding>`, which is taken back here.
        // Interrupts, which look at it, ended with the virtqueues.
        unsafe {
            let binding: *const Binding = (*self.as_raw()).priv_.cast();

            (*self.as_raw()).priv_ = ptr::null_mut();
            drop(Arc::from_raw(binding));
        }
    }
}

impl<Ctx: device::DeviceContext> Device<Ctx> {
    fn binding(&self) -> Option<&Binding> {
        // SAFETY: By the type invariants `priv` is null or a valid pointer. It changes only in
        // `open` and `close`, before and after the device can be used.
        unsafe { (*self.as_raw()).priv_.cast::<Binding>().as_ref() }
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

    fn shared_binding(&self) -> Result<Arc<Binding>> {
        // SAFETY: By the type invariants the device is valid.
        let binding: *const Binding = unsafe { (*self.as_raw()).priv_ }.cast();

        if binding.is_null() {
            return Err(ENODEV);
        }

        // SAFETY: By the type invariants the pointer is from `Arc::into_raw`. The count that it
        // stands for is kept.
        let owned = core::mem::ManuallyDrop::new(unsafe { Arc::from_raw(binding) });

        Ok(Arc::clone(&owned))
    }

    /// Lets the user decide whether [`stay_awake`](Self::stay_awake) has an effect.
    pub(in crate::rust) fn set_wakeup_capable(&self) {
        // SAFETY: By the type invariants the device is valid.
        unsafe { bindings::balloon_rs_set_wakeup_capable(self.as_raw()) };
    }

    /// Returns a handle to the configuration space, which works until the device is unbound or
    /// reset.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device has no configuration space.
    pub(crate) fn config(&self) -> Result<Config> {
        // SAFETY: By the type invariants the device is valid, and so are its operations.
        let ops = unsafe { &*(*self.as_raw()).config };

        if ops.get.is_none() || ops.set.is_none() {
            return Err(EINVAL);
        }

        // INVARIANT: The binding is this device's.
        Ok(Config {
            dev: (&**self).into(),
            binding: self.shared_binding()?,
            len: self.config_len(),
            is_legacy: !self.has_feature(Feature::VERSION_1),
        })
    }

    /// Returns how long the configuration space is, in bytes, or more where it cannot be too short.
    fn config_len(&self) -> c_uint {
        // SAFETY: By the type invariants the device is valid.
        unsafe { bindings::balloon_rs_config_len(self.as_raw()) }
    }

    /// Finds the virtqueues called `names`. For [`Driver::probe`] and [`Driver::restore`], which
    /// may call it once.
    ///
    /// A queue without a name is one that the device does not have: the others are numbered without
    /// it.
    ///
    /// # Errors
    ///
    /// What the transport says, `ENOENT` if the device lacks one of the queues, `EBUSY` if they
    /// were found before, or `ENOMEM`.
    pub(crate) fn find_vqs<const N: usize>(
        &self,
        names: [Option<&'static CStr>; N],
    ) -> Result<FoundQueues<N>> {
        let binding = self.shared_binding()?;
        if binding.vqs.load(Relaxed) != 0 {
            return Err(EBUSY);
        }

        const CALLBACK: Option<unsafe extern "C" fn(*mut bindings::virtqueue)> = Some(vq_callback);

        let mut vqs = [ptr::null_mut(); N];
        let mut infos = names.map(|name| bindings::virtqueue_info {
            name: name.map_or(ptr::null(), |name| name.as_char_ptr()),
            callback: name.and(CALLBACK),
            ctx: false,
        });

        let present = (0u32..)
            .zip(names)
            .filter(|(_, name)| name.is_some())
            .fold(0, |vqs, (index, _)| {
                vqs | 1u32.checked_shl(index).unwrap_or(0)
            });

        // The callbacks need to know, so before there are any.
        binding.vqs.store(present, Relaxed);

        // SAFETY: By the type invariants the device is valid, and every transport has this
        // operation; both arrays have `N` entries. The names are static.
        unsafe {
            let find_vqs = (*(*self.as_raw()).config).find_vqs.ok_or(ENODEV)?;

            to_result(find_vqs(
                self.as_raw(),
                N as c_uint,
                vqs.as_mut_ptr(),
                infos.as_mut_ptr(),
                ptr::null_mut(),
            ))
            .inspect_err(|_| binding.vqs.store(0, Relaxed))?;
        }

        Ok(FoundQueues { vqs, binding })
    }
}

/// Virtqueues that were found, and wait for the type of their buffers.
///
/// # Invariants
///
/// The pointers are null or to virtqueues that nobody else uses, valid while `binding` can be
/// entered.
pub(crate) struct FoundQueues<const N: usize> {
    vqs: [*mut bindings::virtqueue; N],
    binding: Arc<Binding>,
}

impl<const N: usize> FoundQueues<N> {
    /// Takes the queue with index `index`, for buffers of type `B`. What goes through it is added
    /// to `traffic`.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is no such queue or it was taken before; `ENOMEM`.
    pub(crate) fn take<B>(&mut self, index: usize, traffic: Arc<Traffic>) -> Result<Virtqueue<B>> {
        let vq = self.vqs.get_mut(index).ok_or(ENOENT)?;
        let vq = NonNull::new(core::mem::replace(vq, ptr::null_mut())).ok_or(ENOENT)?;

        // SAFETY: By the type invariants, and since the queue can be taken only once.
        unsafe { Virtqueue::new(vq, self.binding.clone(), traffic) }
    }
}

/// The callback of all virtqueues.
extern "C" fn vq_callback(vq: *mut bindings::virtqueue) {
    // SAFETY: The virtio core calls back with a valid queue, the device of which is valid. `priv`
    // is an `Arc<Binding>` from before the queues are found until after they were deleted.
    let (binding, index) = unsafe {
        let binding = (*(*vq).vdev).priv_.cast::<Binding>();
        (&*binding, (*vq).index as usize)
    };

    // Pairs with the release in `make_ready`. A device that calls before it is ready is not heard.
    let data = binding.data.load(Acquire);

    if !data.is_null() {
        // SAFETY: By the type invariants `data` is what the function expects.
        unsafe { (binding.queue_used)(data, binding.position(index)) };
    }
}

/// A field of type `F` in a device's configuration space.
#[derive(Clone, Copy)]
pub(crate) struct Field<F> {
    offset: c_uint,
    _type: PhantomData<F>,
}

impl<F> Field<F> {
    /// Describes the field that lies `offset` bytes into the configuration space.
    pub(in crate::rust) const fn new(offset: usize) -> Self {
        // CAST: A configuration space is at most 4 KiB long.
        Self {
            offset: offset as c_uint,
            _type: PhantomData,
        }
    }

    /// Returns whether the field lies within the first `len` bytes.
    fn is_within(&self, len: c_uint) -> bool {
        // CAST: A field is a number.
        self.offset
            .checked_add(size_of::<F>() as c_uint)
            .is_some_and(|end| end <= len)
    }

    /// Returns where the field lies, in bytes from the beginning of the configuration space.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(in crate::rust) const fn offset(&self) -> usize {
        self.offset as usize
    }
}

/// A handle to a device's configuration space, which works until the device is unbound or reset.
///
/// # Invariants
///
/// - `binding` is the binding of `dev`.
/// - `len` is not more than the transport takes for the length of the configuration space.
pub(crate) struct Config {
    dev: ARef<Device>,
    binding: Arc<Binding>,
    len: c_uint,
    /// Whether the device is from before version 1 of the specification.
    is_legacy: bool,
}

impl Config {
    /// Keeps the transport from being asked for what is not there.
    fn check(&self, field: Field<u32>) -> Result {
        field.is_within(self.len).then_some(()).ok_or(ENXIO)
    }

    /// Reads a little-endian field. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `ENXIO` if it has no such field, `EAGAIN` if the transport
    /// could not read it, or the device changed it meanwhile.
    pub(crate) fn read_le32(&self, field: Field<u32>) -> Result<u32> {
        self.check(field)?;
        let open = self.binding.enter_config().ok_or(ENODEV)?;
        let value = self.get(&open, field, u32::MAX)?;

        // The transports read a legacy device byte by byte: the value may be a part of the old one
        // and a part of the new one.
        if self.is_legacy && self.get(&open, field, u32::MAX)? != value {
            return Err(EAGAIN);
        }
        // A read from where there is no device has all bits set. And a transport that fails to read
        // says nothing, and leaves the buffer as it was.
        //
        // SAFETY: The device is valid, since its binding was entered.
        if value == u32::MAX && unsafe { bindings::balloon_rs_is_gone(self.dev.as_raw()) } {
            return Err(ENODEV);
        }
        if value == u32::MAX && self.get(&open, field, 0)? != value {
            return Err(EAGAIN);
        }

        Ok(value)
    }

    /// Has the transport read `field`, which the device has, into a buffer that holds `before`.
    fn get(&self, _open: &srcu::Guard<'_>, field: Field<u32>, before: u32) -> Result<u32> {
        let mut value = before.to_le_bytes();

        // SAFETY: The device is bound, since its binding was entered, and has the field. The buffer
        // has the right length.
        unsafe {
            let get = (*(*self.dev.as_raw()).config).get.ok_or(ENODEV)?;

            get(
                self.dev.as_raw(),
                field.offset,
                value.as_mut_ptr().cast(),
                4,
            );
        }

        Ok(u32::from_le_bytes(value))
    }

    /// Writes a little-endian field. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `ENXIO` if it has no such field.
    pub(crate) fn write_le32(&self, field: Field<u32>, value: u32) -> Result {
        self.check(field)?;
        let _open = self.binding.enter_config().ok_or(ENODEV)?;
        let value = value.to_le_bytes();

        // SAFETY: The device is bound, since its binding was entered, and has the field. The buffer
        // has the right length.
        unsafe {
            let set = (*(*self.dev.as_raw()).config).set.ok_or(ENODEV)?;

            set(self.dev.as_raw(), field.offset, value.as_ptr().cast(), 4);
        }

        Ok(())
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
