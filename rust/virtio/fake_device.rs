// SPDX-License-Identifier: GPL-2.0

//! A virtio balloon device inside of the kernel, for KUnit.
//!
//! It is registered with the virtio core like any other, so that the driver in this module binds to
//! it. The test plays the device: it takes messages off the queues, and answers them, or not, or
//! wrongly.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_ring.h`](srctree/include/linux/virtio_ring.h)

use crate::rust::{
    bindings,
    virtio::{
        transport::features_of,
        Feature,
        Field, //
    }, //
};

use core::{
    mem::{
        offset_of,
        ManuallyDrop, //
    },
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    container_of,
    error::to_result,
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
    },
};

/// How many queues the device has at most.
const QUEUES: usize = 6;

/// How many entries each queue has at first.
pub(crate) const QUEUE_SIZE: u32 = 16;

/// How many 32-bit fields the configuration space has.
const CONFIG_FIELDS: usize = 6;

/// A queue as the device sees it.
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
    /// Answers all messages, and interrupts the driver if that is wanted.
    ///
    /// # Safety
    ///
    /// `vq` must be this queue, which the driver has not deleted.
    unsafe fn answer_all(&self, vq: *mut bindings::virtqueue, interrupt: bool) {
        // SAFETY: By the requirements of this function. The ring has `num` entries.
        unsafe {
            let ring = &*bindings::virtqueue_get_vring(vq);
            let slot = |n: u32| (n & (ring.num - 1)) as usize;
            let (mut seen, mut answered) = (self.seen.load(Relaxed), self.answered.load(Relaxed));

            // CAST: Indices into a ring are 16 bits wide, and wrap around.
            while (&raw const (*ring.avail).idx).read_volatile() != seen as u16 {
                // What the driver wrote before the index has to be read after it.
                barrier::smp_mb(barrier::Read);
                let head = (*ring.avail).ring.as_ptr().add(slot(seen)).read();
                let used = (*ring.used).ring.as_mut_ptr().add(slot(answered));
                used.write(bindings::vring_used_elem {
                    id: head.into(),
                    len: 0,
                });
                seen = seen.wrapping_add(1);
                answered = answered.wrapping_add(1);
            }
            // The driver must not see the index before the entries.
            barrier::smp_mb(barrier::Write);
            // CAST: As above.
            (&raw mut (*ring.used).idx).write_volatile(answered as u16);
            self.seen.store(seen, Relaxed);
            self.answered.store(answered, Relaxed);
            if interrupt {
                bindings::vring_interrupt(0, vq.cast());
            }
        }
    }
}

/// Called when the driver notifies the device of new messages on a queue, with the index of that. The
/// driver may hold spinlocks.
pub(crate) type OnKick = fn(&FakeDevice, usize);

/// What the device consists of. Freed by its release function.
#[repr(C)]
struct Inner {
    vdev: bindings::virtio_device,
    offered: u64,
    status: Atomic<u32>,
    queue_size: Atomic<u32>,
    config: [Atomic<u32>; CONFIG_FIELDS],
    /// How many times the driver has read and written a field.
    reads: Atomic<u32>,
    writes: Atomic<u32>,
    /// Whether reads fail, if it is not 0.
    failing: Atomic<u32>,
    /// Whether the device answers each message as soon as it is notified, if it is not 0: with an
    /// interrupt if it is 2.
    answering: Atomic<u32>,
    /// One above what the next read returns instead of the field; 0 for the field.
    torn: Atomic<u64>,
    on_kick: Option<OnKick>,
    queues: [Queue; QUEUES],
}

/// A registered device.
///
/// # Invariants
///
/// The device is registered, so that `inner` is valid.
pub(crate) struct FakeDevice {
    inner: NonNull<Inner>,
}

/// A message that the device has to answer.
pub(crate) struct Request {
    head: u16,
    /// Where the message is.
    memory: *mut u16,
    /// What the driver wrote.
    pub(crate) words: KVec<u16>,
    /// How many bytes the driver lets the device write.
    pub(crate) writable: usize,
}

impl Request {
    /// Returns what names the message in [`FakeDevice::answer_raw`].
    pub(crate) fn id(&self) -> u32 {
        self.head.into()
    }

    /// Returns what the driver wrote as little-endian page frame numbers.
    pub(crate) fn pfns(&self) -> Result<KVec<u32>> {
        let mut pfns = KVec::with_capacity(self.words.len() / 2, GFP_KERNEL)?;
        let mut words = self.words.iter().copied().map(u16::from_le).map(u32::from);

        while let (Some(low), Some(high)) = (words.next(), words.next()) {
            pfns.push(low | high << 16, GFP_KERNEL)?;
        }

        Ok(pfns)
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
    /// Registers a device that offers `features`. The driver has bound to it when this returns, if
    /// it wanted to.
    pub(crate) fn new(features: &[Feature]) -> Result<Self> {
        Self::register(bindings::VIRTIO_ID_BALLOON, features, None)
    }

    /// The same for a device that calls `on_kick`.
    pub(crate) fn with_callback(features: &[Feature], on_kick: OnKick) -> Result<Self> {
        Self::register(bindings::VIRTIO_ID_BALLOON, features, Some(on_kick))
    }

    /// Registers a virtio-mem device, to which no driver binds.
    pub(crate) fn virtio_mem() -> Result<Self> {
        Self::register(bindings::VIRTIO_ID_MEM, &[], None)
    }

    fn register(id: u32, features: &[Feature], on_kick: Option<OnKick>) -> Result<Self> {
        let mut inner = KBox::<Inner>::new_uninit(GFP_KERNEL)?;

        // SAFETY: All parts of the struct may be zero: integers, null pointers, no callback, and what
        // `register_virtio_device` initialises. The struct is valid then, and no other code has a pointer
        // to it yet. Once registration was tried, it is freed by the release function only.
        unsafe {
            inner.as_mut_ptr().write_bytes(0, 1);
            let inner = KBox::into_raw(inner.assume_init());

            for &feature in features {
                (*inner).offered |= feature.mask();
            }
            (*inner).on_kick = on_kick;
            (*inner).queue_size.store(QUEUE_SIZE, Relaxed);
            (*inner).vdev.id.device = id;
            (*inner).vdev.config = &CONFIG_OPS;
            (*inner).vdev.dev.release = Some(release);

            let registered = to_result(bindings::register_virtio_device(&mut (*inner).vdev));
            if registered.is_err() {
                bindings::put_device(&mut (*inner).vdev.dev);
            }
            registered?;

            // INVARIANT: The device has been registered.
            Ok(Self {
                inner: NonNull::new_unchecked(inner),
            })
        }
    }

    /// Returns the device as the virtio core sees it. By the type invariants it is registered.
    fn vdev(&self) -> *mut bindings::virtio_device {
        // SAFETY: By the type invariants.
        unsafe { &raw mut (*self.inner.as_ptr()).vdev }
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
    pub(crate) fn has_feature(&self, feature: Feature) -> bool {
        // SAFETY: The device is registered.
        let features = unsafe { *features_of(self.vdev()) };

        features & feature.mask() != 0
    }

    /// Returns the value of a field in the configuration space.
    pub(crate) fn field(&self, field: Field<u32>) -> u32 {
        self.inner()
            .config
            .get(field.offset() / 4)
            .map_or(0, |cell| u32::from_le(cell.load(Relaxed)))
    }

    /// Changes a field in the configuration space, and tells the driver.
    pub(crate) fn change(&self, field: Field<u32>, value: u32) {
        if let Some(cell) = self.inner().config.get(field.offset() / 4) {
            cell.store(value.to_le(), Relaxed);
        }

        // SAFETY: The device is registered.
        unsafe { bindings::virtio_config_changed(self.vdev()) };
    }

    /// Has reads of the configuration space fail from now on, or not any more. As with transports
    /// that fail, the driver's buffer stays as it is.
    pub(crate) fn fail_reads(&self, fail: bool) {
        self.inner().failing.store(fail.into(), Relaxed);
    }

    /// Has the device answer all messages from now on as soon as it is notified of them, with interrupts or
    /// without.
    pub(crate) fn answer_all(&self, interrupt: bool) {
        self.inner()
            .answering
            .store(1 + u32::from(interrupt), Relaxed);
    }

    /// Returns the path of a file of the device's in sysfs.
    pub(crate) fn path(&self, directory: &CStr, file: &CStr) -> Result<CString> {
        let index = self.inner().vdev.index;

        CString::try_from_fmt(fmt!(
            "/sys/bus/virtio/devices/virtio{index}/{directory}/{file}"
        ))
    }

    /// Has the next read of the configuration space return `value`, as if a field changed meanwhile.
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

    /// Has the driver leave the device, as if the system were about to sleep.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn freeze(&self) -> Result {
        // SAFETY: The device is registered.
        to_result(unsafe { bindings::virtio_device_freeze(self.vdev()) })
    }

    /// Has the driver go on with the device after that, with queues of `queue_size` entries (a power
    /// of two).
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn restore(&self, queue_size: u32) -> Result {
        self.inner().queue_size.store(queue_size, Relaxed);
        // SAFETY: The device is registered. If it is not frozen the driver's callback fails.
        to_result(unsafe { bindings::virtio_device_restore(self.vdev()) })
    }

    /// Takes the next message off queue `index`, if there is one.
    pub(crate) fn next(&self, index: usize) -> Result<Option<Request>> {
        let queue = self.queue(index)?;
        let vq = queue.vq.load(Acquire);
        if vq.is_null() {
            return Ok(None);
        }

        // SAFETY: The queue is valid until the driver deletes it, which it does when it is unbound;
        // tests do that last. The ring has `num` entries, and the descriptors name memory that the
        // driver shares.
        unsafe {
            let ring = &*bindings::virtqueue_get_vring(vq);
            let seen = queue.seen.load(Relaxed);

            // CAST: Indices into a ring are 16 bits wide, and wrap around.
            if (&raw const (*ring.avail).idx).read_volatile() == seen as u16 {
                return Ok(None);
            }
            // What the driver wrote before the index has to be read after it.
            barrier::smp_mb(barrier::Read);

            let head = (*ring.avail)
                .ring
                .as_ptr()
                .add((seen & (ring.num - 1)) as usize)
                .read();
            let desc = ring.desc.add(usize::from(head)).read();
            let (readable, writable) = match u32::from(desc.flags) & bindings::VRING_DESC_F_WRITE {
                0 => (desc.len as usize, 0),
                _ => (0, desc.len as usize),
            };
            let len = readable / size_of::<u16>();
            let memory = bindings::phys_to_virt(desc.addr).cast::<u16>();
            let mut words = KVec::with_capacity(len, GFP_KERNEL)?;

            for n in 0..len {
                words.push(memory.add(n).read(), GFP_KERNEL)?;
            }

            queue.seen.store(seen.wrapping_add(1), Relaxed);
            Ok(Some(Request {
                head,
                memory,
                words,
                writable,
            }))
        }
    }

    /// Answers a message, and says that `len` bytes were written to it.
    pub(crate) fn answer(&self, index: usize, request: &Request, len: u32) -> Result {
        self.answer_raw(index, request.id(), len)
    }

    /// Writes `words` into a message that has room for them, and answers it.
    pub(crate) fn fill(&self, index: usize, request: &Request, words: &[u16]) -> Result {
        self.write(request, words)?;
        self.answer(index, request, size_of_val(words) as u32)
    }

    /// Writes `words` into a message that has room for them.
    pub(crate) fn write(&self, request: &Request, words: &[u16]) -> Result {
        if size_of_val(words) > request.writable {
            return Err(ENOSPC);
        }

        // SAFETY: The driver shares the memory until it is answered, and lets the device write that
        // much.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr(), request.memory, words.len()) };
        Ok(())
    }

    /// Puts any answer on queue `index`.
    pub(crate) fn answer_raw(&self, index: usize, id: u32, len: u32) -> Result {
        let queue = self.queue(index)?;
        let vq = queue.vq.load(Acquire);
        if vq.is_null() {
            return Err(ENODEV);
        }

        // SAFETY: As in `next`.
        unsafe {
            let ring = &*bindings::virtqueue_get_vring(vq);
            let answered = queue.answered.load(Relaxed);

            (*ring.used)
                .ring
                .as_mut_ptr()
                .add((answered & (ring.num - 1)) as usize)
                .write(bindings::vring_used_elem { id, len });
            // The driver must not see the index before the entry.
            barrier::smp_mb(barrier::Write);
            // CAST: Indices into a ring are 16 bits wide, and wrap around.
            (&raw mut (*ring.used).idx).write_volatile(answered.wrapping_add(1) as u16);
            queue.answered.store(answered.wrapping_add(1), Relaxed);
        }

        Ok(())
    }

    /// Interrupts the driver on behalf of queue `index`.
    pub(crate) fn interrupt(&self, index: usize) -> Result {
        let vq = self.queue(index)?.vq.load(Acquire);

        if !vq.is_null() {
            // SAFETY: As in `next`.
            unsafe { bindings::vring_interrupt(0, vq.cast()) };
        }

        Ok(())
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        // SAFETY: The device is registered. Nothing uses it any more.
        unsafe { bindings::unregister_virtio_device(self.vdev()) };
    }
}

/// Returns the device that `vdev` is a part of.
///
/// # Safety
///
/// [`FakeDevice::new`] must have registered `vdev`, which must not be released for `'a`.
unsafe fn inner<'a>(vdev: *mut bindings::virtio_device) -> &'a Inner {
    // SAFETY: By the requirements of this function. `Inner` begins with its `vdev`.
    unsafe { &*vdev.cast() }
}

/// # Safety
///
/// Only for the driver core, which calls it with the device in an [`Inner`] that nothing uses any more.
unsafe extern "C" fn release(dev: *mut bindings::device) {
    // SAFETY: By the requirements of this function. `FakeDevice::new` has allocated the `Inner`.
    drop(unsafe {
        let vdev = container_of!(dev, bindings::virtio_device, dev);

        KBox::from_raw(vdev.cast::<Inner>())
    });
}

/// # Safety
///
/// Only for the virtio core, which calls it with a device that [`FakeDevice::new`] has registered,
/// and a buffer of `len` bytes.
unsafe extern "C" fn get(
    vdev: *mut bindings::virtio_device,
    offset: c_uint,
    buf: *mut c_void,
    len: c_uint,
) {
    // SAFETY: By the requirements of this function.
    unsafe {
        let inner = inner(vdev);
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

        ptr::copy_nonoverlapping((&raw const value).cast(), buf, (len as usize).min(4));
    }
}

/// # Safety
///
/// Only for the virtio core, which calls it with a device that [`FakeDevice::new`] has registered,
/// and a buffer of `len` bytes.
unsafe extern "C" fn set(
    vdev: *mut bindings::virtio_device,
    offset: c_uint,
    buf: *const c_void,
    len: c_uint,
) {
    let mut value = 0u32;

    // SAFETY: By the requirements of this function.
    unsafe {
        ptr::copy_nonoverlapping(buf, (&raw mut value).cast(), (len as usize).min(4));
        inner(vdev).writes.add(1, Relaxed);
        if let Some(cell) = inner(vdev).config.get(offset as usize / 4) {
            cell.store(value, Relaxed);
        }
    }
}

/// # Safety
///
/// Only for the virtio core, which calls it with a device that [`FakeDevice::new`] has registered.
unsafe extern "C" fn get_status(vdev: *mut bindings::virtio_device) -> u8 {
    // SAFETY: By the requirements of this function.
    let inner = unsafe { inner(vdev) };

    // CAST: Only bytes are stored.
    inner.status.load(Relaxed) as u8
}

/// # Safety
///
/// As for [`get_status`].
unsafe extern "C" fn set_status(vdev: *mut bindings::virtio_device, status: u8) {
    // SAFETY: By the requirements of this function.
    unsafe { inner(vdev) }.status.store(status.into(), Relaxed);
}

/// # Safety
///
/// As for [`get_status`].
unsafe extern "C" fn reset(vdev: *mut bindings::virtio_device) {
    // SAFETY: By the requirements of this function.
    unsafe { inner(vdev) }.status.store(0, Relaxed);
}

/// # Safety
///
/// Only for the virtio core, which calls it with a device that [`FakeDevice::new`] has registered,
/// and arrays of `nvqs` entries.
unsafe extern "C" fn find_vqs(
    vdev: *mut bindings::virtio_device,
    nvqs: c_uint,
    vqs: *mut *mut bindings::virtqueue,
    infos: *mut bindings::virtqueue_info,
    _affinity: *mut bindings::irq_affinity,
) -> c_int {
    // SAFETY: By the requirements of this function.
    unsafe {
        // Queues without a name do not count: this is how all transports number them.
        let mut queues = inner(vdev).queues.iter().zip(0..);

        for index in 0..nvqs as usize {
            let info = &*infos.add(index);
            if info.name.is_null() {
                *vqs.add(index) = ptr::null_mut();
                continue;
            }

            let Some((queue, number)) = queues.next() else {
                del_vqs(vdev);
                return ENOENT.to_errno();
            };
            let vq = bindings::vring_create_virtqueue(
                number,
                inner(vdev).queue_size.load(Relaxed),
                4096,
                vdev,
                true,
                false,
                false,
                Some(notify),
                info.callback,
                info.name,
            );

            if vq.is_null() {
                del_vqs(vdev);
                return ENOMEM.to_errno();
            }

            queue.seen.store(0, Relaxed);
            queue.answered.store(0, Relaxed);
            queue.vq.store(vq, Release);
            *vqs.add(index) = vq;
        }
    }

    0
}

/// # Safety
///
/// As for [`get_status`]. The queues must not be used any more.
unsafe extern "C" fn del_vqs(vdev: *mut bindings::virtio_device) {
    // SAFETY: By the requirements of this function.
    unsafe {
        for queue in &inner(vdev).queues {
            let vq = queue.vq.xchg(ptr::null_mut(), Relaxed);

            if !vq.is_null() {
                bindings::vring_del_virtqueue(vq);
            }
        }
    }
}

/// # Safety
///
/// As for [`get_status`].
unsafe extern "C" fn get_features(vdev: *mut bindings::virtio_device) -> u64 {
    // SAFETY: By the requirements of this function.
    unsafe { inner(vdev) }.offered
}

/// # Safety
///
/// As for [`get_status`].
unsafe extern "C" fn finalize_features(vdev: *mut bindings::virtio_device) -> c_int {
    // SAFETY: By the requirements of this function.
    unsafe {
        // No other driver can do anything with the device.
        if (*vdev).id.device != bindings::VIRTIO_ID_BALLOON {
            return ENODEV.to_errno();
        }
        bindings::vring_transport_features(vdev);
    }
    0
}

/// # Safety
///
/// Only for the virtio core, which calls it with a queue of a device that [`FakeDevice::new`] has
/// registered.
unsafe extern "C" fn notify(vq: *mut bindings::virtqueue) -> bool {
    // SAFETY: By the requirements of this function.
    let (vdev, index) = unsafe { ((*vq).vdev, (*vq).index as usize) };
    // SAFETY: By the requirements of this function.
    let inner = unsafe { inner(vdev) };

    if let Some(queue) = inner.queues.get(index) {
        queue.kicks.add(1, Relaxed);
        match inner.answering.load(Relaxed) {
            0 => (),
            // SAFETY: By the requirements of this function.
            how => unsafe { queue.answer_all(vq, how == 2) },
        }
    }
    if let Some(on_kick) = inner.on_kick {
        // INVARIANT: The device is registered until this function returns.
        let device = ManuallyDrop::new(FakeDevice {
            inner: NonNull::from(inner),
        });
        on_kick(&device, index);
    }
    true
}

const _: () = assert!(offset_of!(Inner, vdev) == 0);
