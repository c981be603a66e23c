// SPDX-License-Identifier: GPL-2.0

//! Finding a device's virtqueues.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::{
    bindings,
    virtio::{
        bus::{
            binding::Binding,
            device::Device, //
        },
        queue::virtqueue::{
            QueueStats,
            Virtqueue, //
        }, //
    }, //
};

use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    device,
    error::to_result,
    prelude::*,
    sync::Arc, //
};

impl Device<device::Core<'_>> {
    /// Finds the virtqueues called `names`. For [`Driver::probe`] and [`Driver::restore`], which
    /// may call it once.
    ///
    /// A queue without a name is one that the device does not have: the others are numbered without
    /// it.
    ///
    /// # Errors
    ///
    /// The error of the transport, `ENOENT` if the device lacks one of the queues, `EBUSY` if they
    /// were found before, or `ENOMEM`.
    pub(crate) fn find_vqs<const N: usize>(
        &self,
        names: [Option<&'static CStr>; N],
    ) -> Result<FoundQueues<N>> {
        let binding = self.binding().ok_or(ENODEV)?;
        if binding.has_queues() {
            return Err(EBUSY);
        }

        let callback = binding.vq_callback();
        let mut vqs = [ptr::null_mut(); N];
        let mut infos = names.map(|name| bindings::virtqueue_info {
            name: name.map_or(ptr::null(), |name| name.as_char_ptr()),
            callback: name.map(|_| callback),
            ctx: false,
        });

        let present = (0u32..)
            .zip(names)
            .filter(|(_, name)| name.is_some())
            .fold(0, |vqs, (index, _)| {
                vqs | 1u32.checked_shl(index).unwrap_or(0)
            });

        // Recorded before callbacks are possible, since they need it.
        binding.set_queues(present);

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
            .inspect_err(|_| binding.set_queues(0))?;
        }

        Ok(FoundQueues { vqs, binding })
    }
}

/// Found virtqueues, which have no buffer type yet.
///
/// # Invariants
///
/// The pointers are null or to virtqueues that no other thread uses, valid while `binding` can be
/// entered.
pub(crate) struct FoundQueues<const N: usize> {
    vqs: [*mut bindings::virtqueue; N],
    binding: Arc<Binding>,
}

impl<const N: usize> FoundQueues<N> {
    /// Takes the queue with index `index`, for buffers of type `B`. Its traffic is added to
    /// `traffic`. Returns none if there is no such queue, or it was taken before.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn take<B>(
        &mut self,
        index: usize,
        traffic: Arc<QueueStats>,
    ) -> Result<Option<Virtqueue<B>>> {
        let vq = self.vqs.get_mut(index);
        let vq = vq.and_then(|vq| NonNull::new(core::mem::replace(vq, ptr::null_mut())));

        // SAFETY: By the type invariants, and since the queue can be taken only once.
        vq.map(|vq| unsafe { Virtqueue::new(vq, self.binding.clone(), traffic) })
            .transpose()
    }
}
