// SPDX-License-Identifier: GPL-2.0

//! Memory for a buffer of a device.

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

/// Memory for a buffer of a device.
///
/// # Safety
///
/// Implementers must make sure that the result of [`memory`](Self::memory)
///
/// - is the same for as long as the value exists, also when the value is moved,
/// - lies in the kernel's linear mapping, and contains no data that the device must not see,
/// - is not written by the guest while the value exists and is shared, and is initialised, unless
///   the device [writes](Access::Write) it. If the device writes it, the memory is not accessed
///   through shared references, and any bytes are valid content.
pub(crate) unsafe trait Buffer {
    /// Returns the memory, its length in bytes, and the device's access to it.
    fn memory(&self) -> (NonNull<u8>, usize, Access);
}

/// The device's access to a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Device-readable.
    Read,
    /// Device-writable.
    Write,
}

// SAFETY: The elements are allocated by kmalloc, and have no padding by the requirements of
// `AsBytes`. They keep their address when the vector is moved, and are written or moved only
// through `&mut self`.
unsafe impl<T: AsBytes> Buffer for KVec<T> {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        (
            NonNull::from(self.as_slice()).cast(),
            mem::size_of_val(self.as_slice()),
            Access::Read,
        )
    }
}

// SAFETY: The first part is a `Buffer`; the second one accompanies it, and the device does not see
// it.
unsafe impl<B: Buffer, T> Buffer for (B, T) {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        self.0.memory()
    }
}

/// A buffer for a `T` that the device writes.
pub(crate) struct DeviceWritable<T>(KBox<T>);

impl<T: FromBytes + Zeroable> DeviceWritable<T> {
    /// Makes one, filled with zeroes.
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
