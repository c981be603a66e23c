// SPDX-License-Identifier: GPL-2.0

//! The configuration space.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::virtio::bus::{
    binding::{
        Binding,
        Entered, //
    },
    device::Device,
    feature_bit::FeatureBit,
    field::Field, //
};

use kernel::{
    device,
    prelude::*,
    sync::Arc, //
};

impl Device<device::Core<'_>> {
    /// Returns a handle to the configuration space, which works until the device is unbound or
    /// reset.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device has no configuration space.
    pub(crate) fn config(&self) -> Result<Config> {
        // SAFETY: By the type invariants the device is valid, and so are its operations.
        let ops = unsafe { &*(*self.as_raw()).config };
        let is_modern = self.has_feature(FeatureBit::VERSION_1);

        if ops.get.is_none() || ops.set.is_none() {
            return Err(EINVAL);
        }

        // INVARIANT: The binding is this device's.
        Ok(Config {
            binding: self.binding().ok_or(ENODEV)?,
            len: self.config_len(is_modern),
            is_legacy: !is_modern,
        })
    }
}

/// A handle to a device's configuration space, which works until the device is unbound or reset.
///
/// # Invariants
///
/// `len` is at most the transport's length of the configuration space.
pub(crate) struct Config {
    binding: Arc<Binding>,
    len: c_uint,
    /// Whether the device is from before version 1 of the specification.
    is_legacy: bool,
}

/// A field of a device's configuration space that can be accessed.
///
/// # Invariants
///
/// The device has the field.
struct Accessible<'a> {
    dev: Entered<'a>,
    field: Field<u32>,
}

impl Accessible<'_> {
    /// Makes the transport read the field into a buffer that holds `before`.
    fn read(&self, before: u32) -> Result<u32> {
        let mut value = before.to_le_bytes();

        // SAFETY: By the type invariants. The buffer has the right length.
        unsafe {
            let get = (*(*self.dev.as_raw()).config).get.ok_or(ENODEV)?;

            get(
                self.dev.as_raw(),
                self.field.offset,
                value.as_mut_ptr().cast(),
                4,
            );
        }

        Ok(u32::from_le_bytes(value))
    }

    /// Makes the transport write the field.
    fn write(&self, value: u32) -> Result {
        let value = value.to_le_bytes();

        // SAFETY: By the type invariants. The buffer has the right length.
        unsafe {
            let set = (*(*self.dev.as_raw()).config).set.ok_or(ENODEV)?;

            set(
                self.dev.as_raw(),
                self.field.offset,
                value.as_ptr().cast(),
                4,
            );
        }

        Ok(())
    }
}

impl Config {
    /// Keeps the device bound, and checks that the field exists.
    fn access(&self, field: Field<u32>) -> Result<Accessible<'_>> {
        if !field.is_within(self.len) {
            return Err(ENXIO);
        }

        // INVARIANT: `len` is not too large.
        Ok(Accessible {
            dev: self.binding.enter_config().ok_or(ENODEV)?,
            field,
        })
    }

    /// Reads a little-endian field. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `ENXIO` if it has no such field, `EAGAIN` if the transport
    /// could not read it, or the device changed it during the read.
    pub(crate) fn read_le32(&self, field: Field<u32>) -> Result<u32> {
        let field = self.access(field)?;
        let value = field.read(u32::MAX)?;

        // The transports read a legacy device byte by byte: the value may mix the old and the new
        // one.
        if self.is_legacy && field.read(u32::MAX)? != value {
            return Err(EAGAIN);
        }
        // A read from an absent device returns ones. A transport that fails to read reports no
        // error, and does not change the buffer.
        if value == u32::MAX && field.dev.is_gone() {
            return Err(ENODEV);
        }
        if value == u32::MAX && field.read(0)? != value {
            return Err(EAGAIN);
        }

        Ok(value)
    }

    /// Writes a little-endian field. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone, `ENXIO` if it has no such field.
    pub(crate) fn write_le32(&self, field: Field<u32>, value: u32) -> Result {
        self.access(field)?.write(value)
    }
}
