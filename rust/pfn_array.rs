// SPDX-License-Identifier: GPL-2.0

//! Page frame numbers on their way to the device.

use super::virtqueue::Buffer;

use core::{
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// How many page frame numbers fit.
const CAPACITY: usize = 256;

/// An array of page frame numbers in the device's byte order.
///
/// # Invariants
///
/// `len` is at most [`CAPACITY`].
pub(crate) struct PfnArray {
    entries: KBox<[u32; CAPACITY]>,
    len: usize,
}

impl PfnArray {
    /// How many page frame numbers fit.
    pub(crate) const CAPACITY: usize = CAPACITY;

    /// Allocates an empty array.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        // INVARIANT: The array is empty.
        Ok(Self {
            entries: KBox::init(pin_init::init_zeroed(), flags)?,
            len: 0,
        })
    }

    /// Returns how many more entries fit.
    pub(crate) fn room(&self) -> usize {
        CAPACITY - self.len
    }

    /// Appends `entry`, which must be in the device's byte order. Returns false if the array is full.
    #[must_use]
    pub(crate) fn push(&mut self, entry: u32) -> bool {
        let Some(slot) = self.entries.get_mut(self.len) else {
            return false;
        };

        *slot = entry;
        // INVARIANT: The old length is the index of a slot, so it is below the capacity.
        self.len += 1;
        true
    }

    /// Empties the array.
    pub(crate) fn clear(&mut self) {
        // INVARIANT: The array is empty.
        self.len = 0;
    }
}

// SAFETY: The entries are allocated by kmalloc, initialised, and stay where they are when the array is
// moved. They are written only through `&mut self`. By the type invariants `len` of them exist.
unsafe impl Buffer for PfnArray {
    const DEVICE_WRITES: bool = false;

    fn memory(&self) -> (NonNull<u8>, usize) {
        (
            NonNull::from(&*self.entries).cast(),
            self.len * size_of::<u32>(),
        )
    }
}
