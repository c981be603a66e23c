// SPDX-License-Identifier: GPL-2.0

//! Statistics on their way to the device.

use super::{
    bindings,
    virtio::ByteOrder,
    virtqueue::Buffer, //
};

use core::{
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// How many kinds of statistics there are.
const CAPACITY: usize = bindings::VIRTIO_BALLOON_S_NR as usize;

/// Statistics in the device's byte order.
///
/// # Invariants
///
/// `len` is at most [`CAPACITY`].
pub(crate) struct StatBuffer {
    entries: KBox<[bindings::virtio_balloon_stat; CAPACITY]>,
    len: usize,
}

impl StatBuffer {
    /// Allocates an empty buffer.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        const EMPTY: bindings::virtio_balloon_stat =
            bindings::virtio_balloon_stat { tag: 0, val: 0 };

        // INVARIANT: The buffer is empty.
        Ok(Self {
            entries: KBox::new([EMPTY; CAPACITY], flags)?,
            len: 0,
        })
    }

    /// Appends an entry. There is room for one of each kind; more are left out.
    pub(crate) fn push(&mut self, tag: u16, value: u64, order: ByteOrder) {
        if let Some(slot) = self.entries.get_mut(self.len) {
            *slot = bindings::virtio_balloon_stat {
                tag: order.to_device16(tag),
                val: order.to_device64(value),
            };
            // INVARIANT: The old length is the index of a slot, so it is below the capacity.
            self.len += 1;
        }
    }

    /// Empties the buffer.
    pub(crate) fn clear(&mut self) {
        // INVARIANT: The buffer is empty.
        self.len = 0;
    }
}

// SAFETY: The entries are allocated by kmalloc, initialised and without padding, and stay where they are when
// the buffer is moved. They are written only through `&mut self`. By the type invariants `len` of them exist.
unsafe impl Buffer for StatBuffer {
    const DEVICE_WRITES: bool = false;

    fn memory(&self) -> (NonNull<u8>, usize) {
        (
            NonNull::from(&*self.entries).cast(),
            self.len * size_of::<bindings::virtio_balloon_stat>(),
        )
    }
}
