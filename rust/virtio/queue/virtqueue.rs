// SPDX-License-Identifier: GPL-2.0

//! Virtqueues.
//!
//! The queue owns an available buffer until the device has used it, or until the device has been
//! reset. Safe code can neither access nor free it in between.
//!
//! C header: [`include/linux/virtio.h`](srctree/include/linux/virtio.h)

use crate::rust::{
    bindings,
    virtio::{
        bus::binding::{
            Binding,
            Reset, //
        },
        queue::buffer::{
            Access,
            Buffer, //
        }, //
    }, //
};

use core::{
    mem::{
        self,
        MaybeUninit, //
    },
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// The traffic of a virtqueue, for statistics.
pub(crate) struct QueueStats {
    /// Buffers that were made available.
    pub(crate) buffers: Atomic<u64>,
    /// Their length in bytes, whatever part the device has read or written.
    pub(crate) bytes: Atomic<u64>,
    /// Notifications that were sent to the device.
    pub(crate) notifications: Atomic<u64>,
}

impl QueueStats {
    /// Returns an empty one.
    pub(crate) fn new() -> Self {
        Self {
            buffers: Atomic::new(0),
            bytes: Atomic::new(0),
            notifications: Atomic::new(0),
        }
    }
}

/// A function of the ring code.
///
/// # Invariants
///
/// It accepts any virtqueue that no other thread uses.
struct RingFunction<R>(unsafe extern "C" fn(*mut bindings::virtqueue) -> R);

// INVARIANT: These functions do.
const KICK_PREPARE: RingFunction<bool> = RingFunction(bindings::virtqueue_kick_prepare);
const NOTIFY: RingFunction<bool> = RingFunction(bindings::virtqueue_notify);
const DISABLE_CB: RingFunction<()> = RingFunction(bindings::virtqueue_disable_cb);
const ENABLE_CB: RingFunction<bool> = RingFunction(bindings::virtqueue_enable_cb);
const ENABLE_CB_DELAYED: RingFunction<bool> = RingFunction(bindings::virtqueue_enable_cb_delayed);

/// A virtqueue whose buffers are of type `B`.
///
/// # Invariants
///
/// - `vq` is valid and is used only through `self`, for as long as `binding` can be entered.
/// - A buffer that the device owns is in `slots`, at the index that is one below its token. The
///   indices of the empty slots are in `free`, which has room for all.
pub(crate) struct Virtqueue<B> {
    vq: NonNull<bindings::virtqueue>,
    binding: Arc<Binding>,
    traffic: Arc<QueueStats>,
    slots: KVec<Option<B>>,
    free: KVec<usize>,
}

// SAFETY: A virtqueue may be used from any thread, and `&mut self` allows one at a time.
unsafe impl<B: Send> Send for Virtqueue<B> {}

// SAFETY: A shared reference gives read access to `self` only.
unsafe impl<B: Sync> Sync for Virtqueue<B> {}

impl<B: Buffer> Virtqueue<B> {
    /// Makes `buffer` available to the device, which is notified by the next [`kick`](Self::kick).
    ///
    /// Does not sleep and does not allocate.
    ///
    /// # Errors
    ///
    /// Returns the buffer if it is empty, which devices need not support, if the ring is full, if
    /// the queue is broken, or if the device is gone or not ready.
    pub(crate) fn add(&mut self, buffer: B) -> Result<(), B> {
        let (memory, len, access) = buffer.memory();
        let Ok(len @ 1..) = c_uint::try_from(len) else {
            return Err(buffer);
        };
        let mut sg = MaybeUninit::<bindings::scatterlist>::zeroed();

        // A buffer is one descriptor, so that nothing is allocated for an indirect table.
        //
        // SAFETY: `memory` is in the linear mapping by the requirements of `Buffer`, and does not
        // change until the device has used it, since the queue owns the buffer until then.
        unsafe {
            bindings::sg_init_one(sg.as_mut_ptr(), memory.as_ptr().cast(), len);
            self.add_sg(sg.as_mut_ptr(), 1, access, buffer)
        }
    }
}

impl<B> Virtqueue<B> {
    /// Makes a queue of `vq`, whose traffic is added to `traffic`.
    ///
    /// # Safety
    ///
    /// `vq` must be valid for as long as `binding` can be entered, and no other code may use it.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for the table of buffers.
    pub(in crate::rust) unsafe fn new(
        vq: NonNull<bindings::virtqueue>,
        binding: Arc<Binding>,
        traffic: Arc<QueueStats>,
    ) -> Result<Self> {
        // SAFETY: `vq` is valid by the requirements of this function.
        let size = unsafe { bindings::virtqueue_get_vring_size(vq.as_ptr()) } as usize;
        let mut slots = KVec::with_capacity(size, GFP_KERNEL)?;
        let mut free = KVec::with_capacity(size, GFP_KERNEL)?;

        for index in 0..size {
            slots.push(None, GFP_KERNEL)?;
            free.push(index, GFP_KERNEL)?;
        }

        // INVARIANT: All slots are empty.
        Ok(Self {
            vq,
            binding,
            traffic,
            slots,
            free,
        })
    }

    /// Returns the number of the device, which is also in its name.
    pub(crate) fn device(&self) -> u32 {
        self.binding.device()
    }

    /// Returns how many more buffers can be made available now.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Returns the queue's capacity in buffers.
    pub(crate) fn size(&self) -> usize {
        self.slots.len()
    }

    /// Returns how many buffers the device owns.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Makes the memory of the `n` entries of `sg` available to the device. `buffer` is returned
    /// when the device has used it.
    ///
    /// # Safety
    ///
    /// `sg` must be a list of `n` entries. Their memory must stay valid until the device has used
    /// it or was reset. No code may write to it until then, or, if the device writes it, access it.
    ///
    /// # Errors
    ///
    /// As for [`add`](Self::add).
    pub(in crate::rust) unsafe fn add_sg(
        &mut self,
        sg: *mut bindings::scatterlist,
        n: c_uint,
        access: Access,
        buffer: B,
    ) -> Result<(), B> {
        let Some(_open) = self.binding.enter() else {
            return Err(buffer);
        };
        // The ring code warns about a buffer with more parts than the ring has entries. The ring
        // may be shorter after a reset of the device.
        if n as usize > self.slots.len() {
            return Err(buffer);
        }
        let Some(index) = self.free.pop() else {
            return Err(buffer);
        };

        let token = ptr::without_provenance_mut::<c_void>(index + 1);
        let add = match access {
            Access::Read => bindings::virtqueue_add_outbuf,
            Access::Write => bindings::virtqueue_add_inbuf,
        };

        // Any flags that never sleep will do.
        //
        // SAFETY: `vq` is valid since `binding` was entered, and `&mut self` makes sure that no
        // other thread uses it. The caller guarantees the list and the memory.
        let (added, bytes) = unsafe {
            let bytes = sg_bytes(sg, n);
            let added = add(self.vq.as_ptr(), sg, n, token, bindings::GFP_NOWAIT);

            (to_result(added), bytes)
        };

        match (added, self.slots.get_mut(index)) {
            (Ok(()), Some(slot)) => {
                // INVARIANT: The device owns the buffer, which is in the slot below its token.
                *slot = Some(buffer);
                self.traffic.buffers.add(1, Relaxed);
                self.traffic.bytes.add(bytes, Relaxed);
                Ok(())
            }
            _ => {
                // INVARIANT: The slot is still empty. There is room, since the index was popped
                // above.
                let _ = self.free.push_within_capacity(index);
                Err(buffer)
            }
        }
    }

    /// Calls a function of the ring code, unless the device is revoked.
    fn call<R>(&mut self, function: RingFunction<R>) -> Option<R> {
        let _open = self.binding.enter()?;

        // SAFETY: By the type invariants of the function. `vq` is valid since `binding` was
        // entered, and `&mut self` makes sure that no other thread uses it.
        Some(unsafe { function.0(self.vq.as_ptr()) })
    }

    /// Notifies the device of the added buffers, if it has enabled notifications.
    pub(crate) fn kick(&mut self) {
        if self.call(KICK_PREPARE) == Some(true) {
            self.traffic.notifications.add(1, Relaxed);
            self.call(NOTIFY);
        }
    }

    /// Takes the next used buffer, with the used length. The device sets the length: it may be any
    /// value.
    pub(crate) fn next_used(&mut self) -> Option<(B, u32)> {
        let _open = self.binding.enter()?;
        let mut len = 0;

        // SAFETY: `vq` is valid since `binding` was entered, and no other code uses it.
        let token = unsafe { bindings::virtqueue_get_buf(self.vq.as_ptr(), &mut len) };

        // The ring code has checked that the device returned a buffer that it owned.
        let index = token.addr().checked_sub(1)?;
        let buffer = self.slots.get_mut(index)?.take()?;

        // INVARIANT: The slot is empty now. There is room for one index for each slot.
        let _ = self.free.push_within_capacity(index);
        Some((buffer, len))
    }

    /// Takes all buffers back from a device that was reset. The queue accepts no buffers from then
    /// on. Returns none if the device was not reset.
    pub(crate) fn detach_unused(&mut self) -> KVec<Option<B>> {
        if !self.is_reset() {
            return KVec::new();
        }

        // INVARIANT: There are no slots any more.
        self.free.clear();
        mem::replace(&mut self.slots, KVec::new())
    }

    /// Disables callbacks for now. The device may still interrupt.
    pub(crate) fn disable_callback(&mut self) {
        self.call(DISABLE_CB);
    }

    /// Requests a callback when the next buffer has been used.
    ///
    /// Returns false if that has already happened: used buffers are waiting.
    #[must_use]
    pub(crate) fn enable_callback(&mut self) -> bool {
        self.call(ENABLE_CB).unwrap_or(true)
    }

    /// Requests a callback when most of the buffers in flight have been used.
    ///
    /// Returns false if that has already happened: used buffers are waiting.
    #[must_use]
    pub(crate) fn enable_callback_delayed(&mut self) -> bool {
        self.call(ENABLE_CB_DELAYED).unwrap_or(true)
    }

    /// Returns whether the device was reset: it will not access any buffer again.
    pub(crate) fn is_reset(&self) -> bool {
        self.binding.is_reset()
    }

    /// Resets the queue's device, unless it was reset before: no handle to it works any more, and
    /// it will not access any buffer again. The driver may continue with it after a suspend, or
    /// when it is bound again. May sleep.
    pub(in crate::rust) fn reset_device(&self) {
        self.binding.reset(Reset::Restart);
    }

    /// Returns whether the queue cannot be used any more: broken, or the device is gone.
    pub(crate) fn is_broken(&self) -> bool {
        let Some(_open) = self.binding.enter() else {
            return true;
        };

        // SAFETY: `vq` is valid since `binding` was entered.
        unsafe { bindings::virtqueue_is_broken(self.vq.as_ptr()) }
    }
}

impl<B> Drop for Virtqueue<B> {
    fn drop(&mut self) {
        // The device may still access its buffers. Dropping a queue in use is a bug of the driver,
        // and leaking the buffers is the safe way out.
        if self.in_flight() > 0 && !self.binding.is_reset() {
            mem::forget(mem::replace(&mut self.slots, KVec::new()));
        }
    }
}

/// Returns the length of the memory that a scatterlist describes, in bytes.
///
/// # Safety
///
/// `sg` must be a list of `n` entries.
pub(in crate::rust) unsafe fn sg_bytes(mut sg: *mut bindings::scatterlist, n: c_uint) -> u64 {
    let mut bytes = 0;

    for _ in 0..n {
        // SAFETY: The entry exists, and the one after the last is null.
        unsafe {
            bytes += u64::from((*sg).length);
            sg = bindings::sg_next(sg);
        }
    }
    bytes
}
