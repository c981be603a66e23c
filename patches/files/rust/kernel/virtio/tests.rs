// SPDX-License-Identifier: GPL-2.0

//! KUnit tests. A device inside the kernel is registered with the virtio core, and a driver binds
//! to it.

use super::*;
use crate::{
    bindings,
    container_of,
    device::Core,
    device_id::IdArray,
    driver::Registration,
    error::to_result,
    module::this_module,
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        barrier,
        Arc,
        Mutex, //
    },
    LocalModule, //
};
use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};

/// A device type that the specification does not assign.
const DEVICE_TYPE: u32 = 0xffff;

/// The only feature of the device.
const OFFERED: FeatureBit = FeatureBit::new::<0>();

/// A feature that the device does not offer.
const MISSING: FeatureBit = FeatureBit::new::<1>();

/// The only field of the device's configuration space.
const FIELD: Field<u32> = Field::new(0);

/// A field that a transport can have, and this device does not.
const ABSENT_FIELD: Field<u32> = Field::new(c_uint::MAX as usize - 3);

/// The data of the driver.
#[pin_data]
struct Data {
    config: Config,
    has_offered: bool,
    has_missing: bool,
    callbacks: Atomic<u32>,
    #[pin]
    queue: Mutex<Virtqueue<(KVec<u8>, Owner)>>,
}

/// Counts when it is dropped.
struct Owner;

/// How many times an [`Owner`] was dropped.
static DROPPED: Atomic<u32> = Atomic::new(0);

/// The data of the bound driver, or null. It is valid until the device is unregistered.
static BOUND: Atomic<*mut Data> = Atomic::new(ptr::null_mut());

impl Drop for Owner {
    fn drop(&mut self) {
        DROPPED.add(1, Relaxed);
    }
}

struct TestDriver;

// Not by the macro, which is for modules: it exports the table for modpost.
static TEST_TABLE: IdArray<DeviceId, (), 1> =
    IdArray::new_without_index([DeviceId::any_vendor(DEVICE_TYPE)]);

impl Driver for TestDriver {
    type Data<'bound> = Arc<Data>;

    const ID_TABLE: IdTable = &TEST_TABLE;
    const FEATURES: &'static [FeatureBit] = &[OFFERED, MISSING];
    const QUEUE_CALLBACKS: &'static [fn(&Arc<Data>)] = &[|data| {
        data.callbacks.add(1, Relaxed);
    }];

    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
    ) -> impl PinInit<Arc<Data>, Error> + 'bound {
        let stats = Arc::new(QueueStats::new(), GFP_KERNEL)?;
        let queue = dev
            .find_vqs([Some(c"queue")])?
            .take(0, stats)?
            .ok_or(ENODEV)?;
        let data = Arc::pin_init(
            try_pin_init!(Data {
                config: dev.config()?,
                has_offered: dev.has_feature(OFFERED),
                has_missing: dev.has_feature(MISSING),
                callbacks: Atomic::new(0),
                queue <- new_mutex!(queue),
            }),
            GFP_KERNEL,
        )?;

        BOUND.store(Arc::as_ptr(&data).cast_mut(), Release);
        Ok(data)
    }
}

/// The device. Freed by [`release`].
#[repr(C)]
struct TestDevice {
    vdev: bindings::virtio_device,
    status: Atomic<u32>,
    field: Atomic<u32>,
    queue: Atomic<*mut bindings::virtqueue>,
    kicks: Atomic<u32>,
}

static CONFIG_OPS: bindings::virtio_config_ops = bindings::virtio_config_ops {
    get: Some(get),
    set: Some(set),
    get_status: Some(get_status),
    set_status: Some(set_status),
    reset: Some(reset),
    find_vqs: Some(find_vqs),
    del_vqs: Some(del_vqs),
    get_features: Some(get_features),
    finalize_features: Some(finalize_features),
    // The remaining operations are optional.
    ..pin_init::zeroed()
};

/// A registered device.
///
/// # Invariants
///
/// The pointer is to a device that is registered as long as this exists.
struct Registered(NonNull<TestDevice>);

impl Registered {
    /// Registers a device. When this returns, the driver has bound to it, or refused it.
    fn new() -> Result<Self> {
        let mut device = KBox::<TestDevice>::new_uninit(GFP_KERNEL)?;

        // SAFETY: All parts of the struct may be zero, and what `register_virtio_device`
        // initialises. No other code has a pointer to it yet. After that, the release function
        // frees it.
        unsafe {
            device.as_mut_ptr().write_bytes(0, 1);
            let device = KBox::into_raw(device.assume_init());

            (*device).vdev.id.device = DEVICE_TYPE;
            (*device).vdev.config = &CONFIG_OPS;
            (*device).vdev.dev.release = Some(release);

            let registered = to_result(bindings::register_virtio_device(&mut (*device).vdev));
            if registered.is_err() {
                bindings::put_device(&mut (*device).vdev.dev);
            }
            registered?;

            // INVARIANT: The device has been registered.
            Ok(Self(NonNull::new_unchecked(device)))
        }
    }

    fn device(&self) -> &TestDevice {
        // SAFETY: By the type invariants.
        unsafe { self.0.as_ref() }
    }

    /// Returns the data of the driver, if one is bound.
    fn data(&self) -> Option<&Data> {
        // SAFETY: The driver is bound as long as the device is registered, and its data exists.
        unsafe { BOUND.load(Acquire).as_ref() }
    }

    /// Uses the first buffer that the driver has added, and interrupts the driver. Returns the
    /// buffer's length.
    fn use_buffer(&self) -> Result<u32> {
        let vq = NonNull::new(self.device().queue.load(Acquire)).ok_or(ENODEV)?;

        // SAFETY: The driver is bound, so that the queue exists. Only the device writes the used
        // ring, which begins with zeroes. An entry of the other ring is the index of a descriptor.
        unsafe {
            let ring = &*bindings::virtqueue_get_vring(vq.as_ptr());

            if (&raw const (*ring.avail).idx).read_volatile() == 0 {
                return Err(EAGAIN);
            }
            // Entries that the driver wrote before the index must be read after it.
            barrier::smp_mb(barrier::Read);
            let head = (*ring.avail).ring.as_ptr().read();
            let desc = ring.desc.add(usize::from(head)).read();
            let entry = (*ring.used).ring.as_mut_ptr();

            entry.write(bindings::vring_used_elem {
                id: head.into(),
                len: 0,
            });
            // The driver must not see the index before the entry.
            barrier::smp_mb(barrier::Write);
            (&raw mut (*ring.used).idx).write_volatile(1);
            bindings::vring_interrupt(0, vq.as_ptr().cast());
            Ok(desc.len)
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: The device is registered, and not used any more. It begins with its `vdev`.
        unsafe { bindings::unregister_virtio_device(self.0.as_ptr().cast()) };
        BOUND.store(ptr::null_mut(), Release);
    }
}

/// # Safety
///
/// Only for the driver core, which calls it with the device of a [`TestDevice`] that is not used
/// any more.
unsafe extern "C" fn release(dev: *mut bindings::device) {
    // SAFETY: By the requirements of this function. `Registered::new` has allocated the device.
    drop(unsafe {
        let vdev = container_of!(dev, bindings::virtio_device, dev);

        KBox::from_raw(vdev.cast::<TestDevice>())
    });
}

/// Declares the operations of the device, which begin with a [`TestDevice`].
macro_rules! operations {
    ($(
        $(#[$safety:meta])*
        fn $name:ident($device:ident $(, $argument:ident: $type:ty)* $(,)?) $(-> $result:ty)?
            $body:block
    )*) => {$(
        /// # Safety
        ///
        /// Only for the virtio core, which calls it with a device that [`Registered::new`] has
        /// registered.
        $(#[$safety])*
        unsafe extern "C" fn $name(
            vdev: *mut bindings::virtio_device,
            $($argument: $type),*
        ) $(-> $result)? {
            // SAFETY: By the requirements of this function. A `TestDevice` begins with its `vdev`.
            let $device: &TestDevice = unsafe { &*vdev.cast() };

            $body
        }
    )*};
}

operations! {
    /// `buf` is a buffer of `len` bytes.
    fn get(device, _offset: c_uint, buf: *mut c_void, len: c_uint) {
        let value = device.field.load(Relaxed);

        // SAFETY: By the requirements of this function.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast(), buf, (len as usize).min(4)) };
    }

    /// `buf` is a buffer of `len` bytes.
    fn set(device, _offset: c_uint, buf: *const c_void, len: c_uint) {
        let mut value = 0u32;

        // SAFETY: By the requirements of this function.
        unsafe { ptr::copy_nonoverlapping(buf, (&raw mut value).cast(), (len as usize).min(4)) };
        device.field.store(value, Relaxed);
    }

    fn get_status(device) -> u8 {
        device.status.load(Relaxed) as u8
    }

    fn set_status(device, status: u8) {
        device.status.store(status.into(), Relaxed);
    }

    fn reset(device) {
        device.status.store(0, Relaxed);
    }

    /// Both arrays have `nvqs` entries.
    fn find_vqs(
        device,
        nvqs: c_uint,
        vqs: *mut *mut bindings::virtqueue,
        infos: *mut bindings::virtqueue_info,
        _affinity: *mut bindings::irq_affinity,
    ) -> c_int {
        if nvqs != 1 {
            return ENOENT.to_errno();
        }

        // SAFETY: By the requirements of this function. The device is valid, and the driver's name
        // and callback are.
        unsafe {
            let vq = bindings::vring_create_virtqueue(
                0,
                4,
                PAGE_SIZE as c_uint,
                ptr::from_ref(&device.vdev).cast_mut(),
                true,
                false,
                false,
                Some(notify),
                (*infos).callback,
                (*infos).name,
            );

            if vq.is_null() {
                return ENOMEM.to_errno();
            }
            vqs.write(vq);
            device.queue.store(vq, Release);
        }
        0
    }

    /// The queue must not be used any more.
    fn del_vqs(device) {
        let vq = device.queue.xchg(ptr::null_mut(), Relaxed);

        if !vq.is_null() {
            // SAFETY: It comes from `vring_create_virtqueue`.
            unsafe { bindings::vring_del_virtqueue(vq) };
        }
    }

    fn get_features(_device) -> u64 {
        OFFERED.mask() | FeatureBit::VERSION_1.mask()
    }

    fn finalize_features(device) -> c_int {
        // SAFETY: The device is valid.
        unsafe {
            bindings::vring_transport_features(ptr::from_ref(&device.vdev).cast_mut());
        }
        0
    }
}

/// # Safety
///
/// Only for the virtio core, which calls it with the queue of a device that [`Registered::new`] has
/// registered.
unsafe extern "C" fn notify(vq: *mut bindings::virtqueue) -> bool {
    // SAFETY: By the requirements of this function. A `TestDevice` begins with its `vdev`.
    unsafe { (*(*vq).vdev.cast::<TestDevice>()).kicks.add(1, Relaxed) };
    true
}

const _: () = assert!(offset_of!(TestDevice, vdev) == 0);

#[macros::kunit_tests(rust_virtio)]
mod suite {
    use super::*;

    /// Runs `test` with a device that the driver has bound to.
    fn with_device(test: impl FnOnce(&Registered, &Data) -> Result) -> Result {
        let _driver = KBox::pin_init(
            Registration::<Adapter<TestDriver>>::new(
                c"rust_virtio_kunit",
                this_module::<LocalModule>(),
            ),
            GFP_KERNEL,
        )?;
        let device = Registered::new()?;

        test(&device, device.data().ok_or(ENODEV)?)
    }

    fn buffer() -> Result<(KVec<u8>, Owner)> {
        let mut bytes = KVec::new();

        bytes.extend_from_slice(&[1, 2, 3], GFP_KERNEL)?;
        Ok((bytes, Owner))
    }

    #[test]
    fn the_device_sees_the_filled_part_of_a_vector() -> Result {
        let mut buffer = KVec::<u32>::with_capacity(8, GFP_KERNEL)?;

        assert_eq!(buffer.memory().1, 0);
        buffer.push(1, GFP_KERNEL)?;
        assert_eq!(buffer.memory().1, 4);
        assert!(buffer.memory().2 == Access::Read);
        Ok(())
    }

    #[test]
    fn the_memory_stays_where_it_is_when_a_buffer_moves() -> Result {
        let buffer = DeviceWritable::<u64>::new(GFP_KERNEL)?;
        let before = buffer.memory().0;
        let moved = KBox::new(buffer, GFP_KERNEL)?;

        assert_eq!(moved.memory().0, before);
        assert_eq!(moved.memory().1, 8);
        assert!(moved.memory().2 == Access::Write);
        Ok(())
    }

    #[test]
    fn only_a_legacy_device_uses_the_byte_order_of_the_guest() {
        assert_eq!(ByteOrder::Little.to_device32(1), 1u32.to_le());
        assert_eq!(ByteOrder::Native.to_device32(1), 1);
    }

    #[test]
    fn the_driver_binds_with_the_features_that_both_know() -> Result {
        with_device(|device, data| {
            let ready = bindings::VIRTIO_CONFIG_S_DRIVER_OK;

            assert_eq!(device.device().status.load(Relaxed) & ready, ready);
            assert!(data.has_offered);
            assert!(!data.has_missing);
            Ok(())
        })
    }

    #[test]
    fn fields_are_read_and_written_if_the_device_has_them() -> Result {
        with_device(|device, data| {
            device.device().field.store(7u32.to_le(), Relaxed);
            assert_eq!(data.config.read_le32(FIELD)?, 7);
            data.config.write_le32(FIELD, 8)?;
            assert_eq!(device.device().field.load(Relaxed), 8u32.to_le());
            assert_eq!(data.config.read_le32(ABSENT_FIELD), Err(ENXIO));
            Ok(())
        })
    }

    #[test]
    fn the_driver_gets_a_buffer_back_after_the_device_has_used_it() -> Result {
        with_device(|device, data| {
            let mut queue = data.queue.lock();

            assert!(queue.add(buffer()?).is_ok());
            queue.kick();
            assert_eq!(queue.in_flight(), 1);
            assert_eq!(device.device().kicks.load(Relaxed), 1);
            assert!(queue.next_used().is_none());

            assert_eq!(device.use_buffer()?, 3);
            assert_eq!(data.callbacks.load(Relaxed), 1);
            assert!(queue
                .next_used()
                .is_some_and(|((bytes, _), len)| { bytes.as_slice() == [1, 2, 3] && len == 0 }));
            assert_eq!(queue.in_flight(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_full_queue_returns_the_buffer() -> Result {
        with_device(|_, data| {
            let mut queue = data.queue.lock();

            while queue.room() > 0 {
                assert!(queue.add(buffer()?).is_ok());
            }
            assert_eq!(queue.in_flight(), queue.size());
            assert!(queue.add(buffer()?).is_err());
            Ok(())
        })
    }

    #[test]
    fn a_buffer_in_flight_is_freed_when_the_device_has_been_reset() -> Result {
        DROPPED.store(0, Relaxed);
        with_device(|_, data| {
            assert!(data.queue.lock().add(buffer()?).is_ok());
            assert_eq!(DROPPED.load(Relaxed), 0);
            Ok(())
        })?;
        assert_eq!(DROPPED.load(Relaxed), 1);
        Ok(())
    }
}
