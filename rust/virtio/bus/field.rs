// SPDX-License-Identifier: GPL-2.0

//! Fields of the configuration space.

use core::marker::PhantomData;
use kernel::prelude::*;

/// A field of type `F` in a device's configuration space.
#[derive(Clone, Copy)]
pub(crate) struct Field<F> {
    pub(in crate::rust::virtio) offset: c_uint,
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
    pub(in crate::rust::virtio) fn is_within(&self, len: c_uint) -> bool {
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
