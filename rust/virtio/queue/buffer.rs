// SPDX-License-Identifier: GPL-2.0

//! Memory that can be offered to a device.

use core::{
    mem,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    transmute::{
        AsBytes,
        FromBytes, //
    }, //
};

/// Memory that can be offered to a device.
///
/// # Safety
///
/// Implementers must make sure that what [`memory`](Self::memory) returns
///
/// - is the same for as long as the value exists, also when the value is moved,
/// - lies in the kernel's linear mapping, and holds nothing that the device must not see,
/// - is not written by anybody while the value exists and is shared, and unless the device
///   [writes](Access::Write) it, is initialised; if it does, the memory is not accessed at all
///   through shared references, and any bytes are valid content for it.
pub(crate) unsafe trait Buffer {
    /// Returns the memory, its length in bytes, and what the device does with it.
    fn memory(&self) -> (NonNull<u8>, usize, Access);
}

/// What a device does with a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It reads it.
    Read,
    /// It writes it.
    Write,
}

// SAFETY: The elements are allocated by kmalloc, and have no padding by the requirements of
// `AsBytes`. They stay where they are when the vector is moved; only through `&mut self` are they
// written, or moved elsewhere.
unsafe impl<T: AsBytes> Buffer for KVec<T> {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        (
            NonNull::from(self.as_slice()).cast(),
            mem::size_of_val(self.as_slice()),
            Access::Read,
        )
    }
}

// SAFETY: The first part is a `Buffer`; the second one travels along, and the device does not see
// it.
unsafe impl<B: Buffer, T> Buffer for (B, T) {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        self.0.memory()
    }
}

/// A place for a `T` that the device writes.
pub(crate) struct DeviceWritable<T>(KBox<T>);

impl<T: FromBytes + Zeroable> DeviceWritable<T> {
    /// Makes one, with nothing in it but zeroes.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(flags: kernel::alloc::Flags) -> Result<Self> {
        Ok(Self(KBox::init(pin_init::init_zeroed(), flags)?))
    }

    /// Returns the bytes that the device wrote, and fills the buffer with zeroes.
    pub(crate) fn take(&mut self) -> T {
        mem::replace(&mut *self.0, pin_init::zeroed())
    }
}

// SAFETY: The memory is allocated by kmalloc, and is not accessed through shared references. Any
// bytes are a `T`.
unsafe impl<T: FromBytes> Buffer for DeviceWritable<T> {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        (
            NonNull::from(&*self.0).cast(),
            mem::size_of::<T>(),
            Access::Write,
        )
    }
}

/// A buffer that is of one of two kinds.
pub(crate) enum Either<A, B> {
    /// The first kind.
    Left(A),
    /// The second kind.
    Right(B),
}

// SAFETY: Both kinds are buffers, and a value stays of its kind while it is shared.
unsafe impl<A: Buffer, B: Buffer> Buffer for Either<A, B> {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        match self {
            Self::Left(buffer) => buffer.memory(),
            Self::Right(buffer) => buffer.memory(),
        }
    }
}
