// SPDX-License-Identifier: GPL-2.0

//! A virtio device inside the kernel, for KUnit.
//!
//! It is registered with the virtio core like any other device, so that a driver for devices with
//! its id binds to it. The test acts as the device: it takes messages from the queues, and uses
//! them, or not, or wrongly.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_ring.h`](srctree/include/linux/virtio_ring.h)

use crate::rust::{
    bindings,
    kunit::Cleanup,
    virtio::{
        ByteOrder,
        Device,
        DeviceId,
        FeatureBit,
        Field, //
    }, //
};

use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    container_of,
    device,
    error::to_result,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        barrier, //
    }, //
};

/// The maximum number of queues. No driver with more of them can bind.
const QUEUES: usize = 32;

/// The initial number of entries of each queue.
pub(crate) const QUEUE_SIZE: u32 = 16;

/// The number of 32-bit fields of the configuration space. Others read as 0.
const CONFIG_FIELDS: usize = 32;

impl ByteOrder {
    /// Returns the number that is `value` in this byte order.
    fn to_native16(self, value: u16) -> u16 {
        // The conversion is its own inverse.
        self.to_device16(value)
    }

    /// Returns the number that is `value` in this byte order.
    pub(crate) fn to_native32(self, value: u32) -> u32 {
        self.to_device32(value)
    }

    /// Returns the number that is `value` in this byte order.
    fn to_native64(self, value: u64) -> u64 {
        self.to_device64(value)
    }
}

/// The device's side of a queue.
struct Queue {
    /// The queue, or null if the driver has not set it up.
    vq: Atomic<*mut bindings::virtqueue>,
    /// How many messages the device has seen.
    seen: Atomic<u32>,
    /// How many messages the device has answered.
    answered: Atomic<u32>,
    /// How many times the driver has notified the device.
    kicks: Atomic<u32>,
}

impl Queue {
    /// Returns the queue's ring, if the driver has set the queue up.
    fn ring(&self) -> Option<Ring<'_>> {
        let vq = NonNull::new(self.vq.load(Acquire))?;
        // SAFETY: The queue and its device are valid until the driver deletes the queue. The
        // features do not change before that. `Device` is a transparent `virtio_device`.
        let (ring, byte_order) = unsafe {
            let dev = (*vq.as_ptr()).vdev.cast::<Device<device::Core<'_>>>();

            (
                &*bindings::virtqueue_get_vring(vq.as_ptr()),
                (*dev).byte_order(),
            )
        };

        // INVARIANT: The driver deletes its queues when it is unbound, or suspended. Tests do that
        // only when they do not use the queue any more.
        Some(Ring {
            vq,
            ring,
            byte_order,
            queue: self,
        })
    }
}

/// The ring of a queue: the device reads one part and writes the other.
///
/// # Invariants
///
/// The driver has set `vq` up, and does not delete it as long as this exists. `ring` is its ring.
struct Ring<'a> {
    vq: NonNull<bindings::virtqueue>,
    ring: &'a bindings::vring,
    byte_order: ByteOrder,
    queue: &'a Queue,
}

impl Ring<'_> {
    /// Returns the entry of the ring that has the index `index`.
    fn slot(&self, index: u32) -> usize {
        (index & (self.ring.num - 1)) as usize
    }

    /// Takes the next message, if there is one: returns its number, and its only descriptor, in the
    /// guest's byte order.
    fn next(&self) -> Option<(u16, bindings::vring_desc)> {
        let seen = self.queue.seen.load(Relaxed);

        // SAFETY: By the type invariants. The ring has `num` entries. An entry is the index of a
        // descriptor.
        let (head, desc) = unsafe {
            let avail = self.ring.avail;

            // CAST: Indices into a ring are 16 bits wide, and wrap around.
            let seen_index = self.byte_order.to_device16(seen as u16);
            if (&raw const (*avail).idx).read_volatile() == seen_index {
                return None;
            }
            // Entries that the driver wrote before the index must be read after it.
            barrier::smp_mb(barrier::Read);
            let head = (*avail).ring.as_ptr().add(self.slot(seen)).read();
            let head = self.byte_order.to_native16(head);

            (head, self.ring.desc.add(usize::from(head)).read())
        };

        self.queue.seen.store(seen.wrapping_add(1), Relaxed);
        Some((
            head,
            bindings::vring_desc {
                addr: self.byte_order.to_native64(desc.addr),
                len: self.byte_order.to_native32(desc.len),
                flags: self.byte_order.to_native16(desc.flags),
                next: self.byte_order.to_native16(desc.next),
            },
        ))
    }

    /// Puts a used entry on the ring.
    fn answer(&self, id: u32, len: u32) {
        let answered = self.queue.answered.load(Relaxed);
        let next = answered.wrapping_add(1);

        // SAFETY: By the type invariants. The ring has `num` entries.
        unsafe {
            let used = self.ring.used;
            let entry = (*used).ring.as_mut_ptr().add(self.slot(answered));

            entry.write(bindings::vring_used_elem {
                id: self.byte_order.to_device32(id),
                len: self.byte_order.to_device32(len),
            });
            // The driver must not see the index before the entry.
            barrier::smp_mb(barrier::Write);
            // CAST: Indices into a ring are 16 bits wide, and wrap around.
            (&raw mut (*used).idx).write_volatile(self.byte_order.to_device16(next as u16));
        }
        self.queue.answered.store(next, Relaxed);
    }

    /// Answers all messages.
    fn answer_all(&self) {
        while let Some((head, _)) = self.next() {
            self.answer(head.into(), 0);
        }
    }

    /// Interrupts the driver.
    fn interrupt(&self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::vring_interrupt(0, self.vq.as_ptr().cast()) };
    }
}

/// Called when the driver notifies the device of new messages on a queue, with the queue's index.
/// The driver may hold spinlocks.
pub(crate) type OnKick = fn(&FakeDevice, usize);

/// The parts of the device. Freed by its release function.
#[repr(C)]
struct Inner {
    vdev: bindings::virtio_device,
    /// Whether a driver may bind.
    is_usable: bool,
    offered: u64,
    status: Atomic<u32>,
    queue_size: Atomic<u32>,
    config: [Atomic<u32>; CONFIG_FIELDS],
    /// How many times the driver has read and written a field.
    reads: Atomic<u32>,
    writes: Atomic<u32>,
    /// Not 0 if reads fail.
    failing: Atomic<u32>,
    /// Not 0 if the device uses each message as soon as it is notified; 2 to interrupt, too.
    answering: Atomic<u32>,
    /// The next read returns this minus 1; 0 for the field's value.
    torn: Atomic<u64>,
    on_kick: Option<OnKick>,
    queues: [Queue; QUEUES],
}

/// A registered device. It is unregistered when this is dropped, or at the end of the test.
///
/// # Invariants
///
/// The device is registered, so that `inner` is valid.
pub(crate) struct FakeDevice {
    inner: NonNull<Inner>,
    /// Unregisters the device.
    _registration: Option<Cleanup>,
}

/// How many devices are registered.
static REGISTERED: Atomic<usize> = Atomic::new(0);

/// Returns how many devices are registered.
pub(crate) fn registered() -> usize {
    REGISTERED.load(Relaxed)
}

/// # Safety
///
/// `vdev` must be a device that [`FakeDevice::register`] has registered, and that is not used any
/// more.
unsafe extern "C" fn unregister(vdev: *mut c_void) {
    // SAFETY: By the requirements of this function.
    unsafe { bindings::unregister_virtio_device(vdev.cast()) };
    REGISTERED.fetch_sub(1, Relaxed);
}

/// A message that the device has not used yet.
pub(crate) struct Request {
    head: u16,
    /// The address of the message.
    memory: *mut u16,
    /// The device's byte order.
    pub(crate) byte_order: ByteOrder,
    /// The bytes of the driver.
    pub(crate) words: KVec<u16>,
    /// How many bytes the device may write.
    pub(crate) writable: usize,
}

impl Request {
    /// Returns the id of the message for [`FakeDevice::answer_raw`].
    pub(crate) fn id(&self) -> u32 {
        self.head.into()
    }
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

impl FakeDevice {
    /// Registers a device that offers `features`, and calls `on_kick`. When this returns, a driver
    /// has bound to it, or refused it.
    pub(crate) fn register(
        id: DeviceId,
        features: &[FeatureBit],
        on_kick: Option<OnKick>,
    ) -> Result<Self> {
        Self::register_as(id, true, features, on_kick)
    }

    /// Registers a device to which no driver can bind.
    pub(crate) fn register_unusable(id: DeviceId) -> Result<Self> {
        Self::register_as(id, false, &[], None)
    }

    fn register_as(
        id: DeviceId,
        is_usable: bool,
        features: &[FeatureBit],
        on_kick: Option<OnKick>,
    ) -> Result<Self> {
        let mut inner = KBox::<Inner>::new_uninit(GFP_KERNEL)?;

        // SAFETY: All parts of the struct may be zero: integers, null pointers, no callback, and
        // what `register_virtio_device` initialises. The struct is valid then, and no other code
        // has a pointer to it yet. Once registration was tried, it is freed by the release function
        // only.
        unsafe {
            inner.as_mut_ptr().write_bytes(0, 1);
            let inner = KBox::into_raw(inner.assume_init());

            for &feature in features {
                (*inner).offered |= feature.mask();
            }
            (*inner).is_usable = is_usable;
            (*inner).on_kick = on_kick;
            (*inner).queue_size.store(QUEUE_SIZE, Relaxed);
            (*inner).vdev.id.device = id.device();
            (*inner).vdev.config = &CONFIG_OPS;
            (*inner).vdev.dev.release = Some(release);

            let registered = to_result(bindings::register_virtio_device(&mut (*inner).vdev));
            if registered.is_err() {
                bindings::put_device(&mut (*inner).vdev.dev);
            }
            registered?;
            REGISTERED.add(1, Relaxed);

            // INVARIANT: The device has been registered.
            Ok(Self {
                inner: NonNull::new_unchecked(inner),
                _registration: Some(
                    Cleanup::new(unregister, inner.cast())
                        .inspect_err(|_| unregister(inner.cast()))?,
                ),
            })
        }
    }

    /// Returns the virtio device. By the type invariants it is registered.
    fn vdev(&self) -> *mut bindings::virtio_device {
        // It is the first field of `Inner`.
        self.inner.as_ptr().cast()
    }

    fn inner(&self) -> &Inner {
        // SAFETY: By the type invariants.
        unsafe { self.inner.as_ref() }
    }

    fn queue(&self, index: usize) -> Result<&Queue> {
        self.inner().queues.get(index).ok_or(EINVAL)
    }

    /// Returns whether a driver has bound to the device and made it ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.inner().status.load(Relaxed) & bindings::VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// Returns whether `feature` was negotiated.
    pub(crate) fn has_feature(&self, feature: FeatureBit) -> bool {
        // SAFETY: The device is registered.
        let features = unsafe { *(*self.vdev().cast::<Device>()).features() };

        features & feature.mask() != 0
    }

    /// Returns the value of a field in the configuration space.
    pub(crate) fn field(&self, field: Field<u32>) -> u32 {
        self.inner()
            .config
            .get(field.offset() / 4)
            .map_or(0, |cell| u32::from_le(cell.load(Relaxed)))
    }

    /// Changes a field in the configuration space, and notifies the driver.
    pub(crate) fn change(&self, field: Field<u32>, value: u32) {
        if let Some(cell) = self.inner().config.get(field.offset() / 4) {
            cell.store(value.to_le(), Relaxed);
        }

        // SAFETY: The device is registered.
        unsafe { bindings::virtio_config_changed(self.vdev()) };
    }

    /// Makes reads of the configuration space fail from now on, or succeed again. As with
    /// transports that fail, the driver's buffer does not change.
    pub(crate) fn fail_reads(&self, fail: bool) {
        self.inner().failing.store(fail.into(), Relaxed);
    }

    /// Enables the device's wakeup source, as the user may do.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn enable_wakeup(&self) -> Result {
        // SAFETY: The device is registered.
        to_result(unsafe { bindings::device_set_wakeup_enable(&raw mut (*self.vdev()).dev, true) })
    }

    /// Returns whether the device's wakeup source keeps the system awake, if it is enabled.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn is_awake(&self) -> bool {
        // SAFETY: The device is registered, and a wakeup source that was enabled remains. Other
        // code writes to it as well: a copy may be old.
        unsafe {
            let source = (*self.vdev()).dev.power.wakeup;

            !source.is_null() && source.read_volatile().active()
        }
    }

    /// Makes the device use all messages from now on as soon as it is notified of them, with
    /// interrupts or without.
    pub(crate) fn answer_all(&self, interrupt: bool) {
        self.inner()
            .answering
            .store(1 + u32::from(interrupt), Relaxed);
    }

    /// Returns the path of a file of the device in sysfs.
    pub(crate) fn path(&self, directory: &CStr, file: &CStr) -> Result<CString> {
        let index = self.inner().vdev.index;

        CString::try_from_fmt(fmt!(
            "/sys/bus/virtio/devices/virtio{index}/{directory}/{file}"
        ))
    }

    /// Makes the next read of the configuration space return `value`, as if a field changed
    /// meanwhile.
    pub(crate) fn tear_read(&self, value: u32) {
        self.inner().torn.store(u64::from(value) + 1, Relaxed);
    }

    /// Returns how many times the driver has read and written fields of the configuration space.
    pub(crate) fn accesses(&self) -> (u32, u32) {
        let inner = self.inner();

        (inner.reads.load(Relaxed), inner.writes.load(Relaxed))
    }

    /// Returns how often the driver has notified the device of new messages on queue `index`.
    pub(crate) fn kicks(&self, index: usize) -> u32 {
        self.queue(index)
            .map_or(0, |queue| queue.kicks.load(Relaxed))
    }

    /// Freezes the device, as before a system suspend.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn freeze(&self) -> Result {
        // SAFETY: The device is registered.
        to_result(unsafe { bindings::virtio_device_freeze(self.vdev()) })
    }

    /// Restores the device after that, with queues of `queue_size` entries (a power of two).
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn restore(&self, queue_size: u32) -> Result {
        self.inner().queue_size.store(queue_size, Relaxed);
        // SAFETY: The device is registered. If it is not frozen the driver's callback fails.
        to_result(unsafe { bindings::virtio_device_restore(self.vdev()) })
    }

    /// Takes the next message off queue `index`, if there is one.
    pub(crate) fn next(&self, index: usize) -> Result<Option<Request>> {
        let Some(ring) = self.queue(index)?.ring() else {
            return Ok(None);
        };
        let Some((head, desc)) = ring.next() else {
            return Ok(None);
        };
        let (readable, writable) = match u32::from(desc.flags) & bindings::VRING_DESC_F_WRITE {
            0 => (desc.len as usize, 0),
            _ => (0, desc.len as usize),
        };
        let memory = address(desc.addr).cast::<u16>();
        let mut words = KVec::with_capacity(readable / size_of::<u16>(), GFP_KERNEL)?;

        for n in 0..readable / size_of::<u16>() {
            // SAFETY: The descriptor points to memory that the driver shares.
            words.push(unsafe { memory.add(n).read() }, GFP_KERNEL)?;
        }
        Ok(Some(Request {
            head,
            memory,
            byte_order: ring.byte_order,
            words,
            writable,
        }))
    }

    /// Uses a message, with the length `len`.
    pub(crate) fn answer(&self, index: usize, request: &Request, len: u32) -> Result {
        self.answer_raw(index, request.id(), len)
    }

    /// Writes `words` into a message that has room for them, and uses it.
    pub(crate) fn fill(&self, index: usize, request: &Request, words: &[u16]) -> Result {
        self.write(request, words)?;
        self.answer(index, request, size_of_val(words) as u32)
    }

    /// Writes `words` into a message that has room for them.
    pub(crate) fn write(&self, request: &Request, words: &[u16]) -> Result {
        if size_of_val(words) > request.writable {
            return Err(ENOSPC);
        }

        // SAFETY: The driver shares the memory until the device has used it, and the device may
        // write that much.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr(), request.memory, words.len()) };
        Ok(())
    }

    /// Puts any used entry on queue `index`.
    pub(crate) fn answer_raw(&self, index: usize, id: u32, len: u32) -> Result {
        self.queue(index)?.ring().ok_or(ENODEV)?.answer(id, len);
        Ok(())
    }

    /// Interrupts the driver on behalf of queue `index`.
    pub(crate) fn interrupt(&self, index: usize) -> Result {
        if let Some(ring) = self.queue(index)?.ring() {
            ring.interrupt();
        }
        Ok(())
    }
}

/// Returns the kernel's address of memory at a physical address.
fn address(physical: u64) -> *mut u8 {
    let pfn = (physical >> PAGE_SHIFT) as usize;

    // SAFETY: Memory that a driver shares has a page.
    let page: *mut u8 = unsafe { bindings::page_address(bindings::pfn_to_page(pfn)).cast() };

    page.wrapping_add(physical as usize % PAGE_SIZE)
}

/// Declares the operations of the device, which begin with its [`Inner`].
macro_rules! operations {
    ($(
        $(#[$safety:meta])*
        fn $name:ident($inner:ident: &Inner $(, $argument:ident: $type:ty)* $(,)?) $(-> $result:ty)?
            $body:block
    )*) => {$(
        /// # Safety
        ///
        /// Only for the virtio core, which calls it with a device that
        /// [`FakeDevice::register`] has registered.
        $(#[$safety])*
        unsafe extern "C" fn $name(
            vdev: *mut bindings::virtio_device,
            $($argument: $type),*
        ) $(-> $result)? {
            // SAFETY: By the requirements of this function. `Inner` begins with its `vdev`.
            let $inner: &Inner = unsafe { &*vdev.cast() };

            $body
        }
    )*};
}

/// # Safety
///
/// Only for the driver core, which calls it with the device in an [`Inner`] that is not used any
/// more.
unsafe extern "C" fn release(dev: *mut bindings::device) {
    // SAFETY: By the requirements of this function. `FakeDevice::register` has allocated the
    // `Inner`.
    drop(unsafe {
        let vdev = container_of!(dev, bindings::virtio_device, dev);

        KBox::from_raw(vdev.cast::<Inner>())
    });
}

operations! {
    /// `buf` is a buffer of `len` bytes.
    fn get(inner: &Inner, offset: c_uint, buf: *mut c_void, len: c_uint) {
        inner.reads.add(1, Relaxed);
        if inner.failing.load(Relaxed) > 0 {
            return;
        }
        let value = match inner.torn.xchg(0, Relaxed) {
            0 => inner
                .config
                .get(offset as usize / 4)
                .map_or(0, |cell| cell.load(Relaxed)),
            // CAST: One above a field.
            torn => ((torn - 1) as u32).to_le(),
        };

        // SAFETY: By the requirements of this function.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast(), buf, (len as usize).min(4)) };
    }

    /// `buf` is a buffer of `len` bytes.
    fn set(inner: &Inner, offset: c_uint, buf: *const c_void, len: c_uint) {
        let mut value = 0u32;

        // SAFETY: By the requirements of this function.
        unsafe { ptr::copy_nonoverlapping(buf, (&raw mut value).cast(), (len as usize).min(4)) };
        inner.writes.add(1, Relaxed);
        if let Some(cell) = inner.config.get(offset as usize / 4) {
            cell.store(value, Relaxed);
        }
    }

    fn get_status(inner: &Inner) -> u8 {
        // CAST: Only bytes are stored.
        inner.status.load(Relaxed) as u8
    }

    fn set_status(inner: &Inner, status: u8) {
        inner.status.store(status.into(), Relaxed);
    }

    fn reset(inner: &Inner) {
        inner.status.store(0, Relaxed);
    }

    /// Both arrays have `nvqs` entries.
    fn find_vqs(
        inner: &Inner,
        nvqs: c_uint,
        vqs: *mut *mut bindings::virtqueue,
        infos: *mut bindings::virtqueue_info,
        _affinity: *mut bindings::irq_affinity,
    ) -> c_int {
        // SAFETY: By the requirements of this function.
        let (vqs, infos) = unsafe {
            (
                core::slice::from_raw_parts_mut(vqs, nvqs as usize),
                core::slice::from_raw_parts(infos, nvqs as usize),
            )
        };

        match inner.create_queues(vqs, infos) {
            Ok(()) => 0,
            Err(error) => {
                inner.delete_queues();
                error.to_errno()
            }
        }
    }

    /// The queues must not be used any more.
    fn del_vqs(inner: &Inner) {
        inner.delete_queues();
    }

    fn get_features(inner: &Inner) -> u64 {
        inner.offered
    }

    fn finalize_features(inner: &Inner) -> c_int {
        if !inner.is_usable {
            return ENODEV.to_errno();
        }
        // SAFETY: The device is valid.
        unsafe { bindings::vring_transport_features(inner.vdev()) };
        0
    }
}

impl Inner {
    fn vdev(&self) -> *mut bindings::virtio_device {
        // It is the first field of this.
        ptr::from_ref(self).cast_mut().cast()
    }

    /// Creates the queues that have a name: queues without one do not count, which is how all
    /// transports number them.
    fn create_queues(
        &self,
        vqs: &mut [*mut bindings::virtqueue],
        infos: &[bindings::virtqueue_info],
    ) -> Result {
        let mut queues = self.queues.iter().zip(0..);

        for (place, info) in vqs.iter_mut().zip(infos) {
            *place = ptr::null_mut();
            if info.name.is_null() {
                continue;
            }
            let (queue, number) = queues.next().ok_or(ENOENT)?;
            // SAFETY: The device is valid, and the driver's name and callback are.
            let vq = unsafe {
                bindings::vring_create_virtqueue(
                    number,
                    self.queue_size.load(Relaxed),
                    4096,
                    self.vdev(),
                    true,
                    false,
                    false,
                    Some(notify),
                    info.callback,
                    info.name,
                )
            };
            if vq.is_null() {
                return Err(ENOMEM);
            }

            queue.seen.store(0, Relaxed);
            queue.answered.store(0, Relaxed);
            queue.vq.store(vq, Release);
            *place = vq;
        }
        Ok(())
    }

    /// Deletes the queues, which are not used any more.
    fn delete_queues(&self) {
        for queue in &self.queues {
            let vq = queue.vq.xchg(ptr::null_mut(), Relaxed);

            if !vq.is_null() {
                // SAFETY: It comes from `vring_create_virtqueue`.
                unsafe { bindings::vring_del_virtqueue(vq) };
            }
        }
    }
}

/// # Safety
///
/// Only for the virtio core, which calls it with a queue of a device that [`FakeDevice::register`]
/// has registered.
unsafe extern "C" fn notify(vq: *mut bindings::virtqueue) -> bool {
    // SAFETY: By the requirements of this function. `Inner` begins with its `vdev`.
    let (inner, index) = unsafe { (&*(*vq).vdev.cast::<Inner>(), (*vq).index as usize) };

    if let Some(queue) = inner.queues.get(index) {
        queue.kicks.add(1, Relaxed);
        let answering = inner.answering.load(Relaxed);
        if let Some(ring) = queue.ring().filter(|_| answering > 0) {
            ring.answer_all();
            if answering == 2 {
                ring.interrupt();
            }
        }
    }
    if let Some(on_kick) = inner.on_kick {
        // INVARIANT: The device is registered until this function returns.
        let device = FakeDevice {
            inner: NonNull::from(inner),
            _registration: None,
        };
        on_kick(&device, index);
    }
    true
}

const _: () = assert!(offset_of!(Inner, vdev) == 0);
