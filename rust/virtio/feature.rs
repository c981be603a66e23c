// SPDX-License-Identifier: GPL-2.0

//! Feature bits and their negotiation.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::{
    bindings,
    virtio::{
        field::Field,
        transport::{
            self,
            features_of, //
        }, //
    }, //
};

use core::{
    cell::Cell,
    marker::PhantomData, //
};
use kernel::{
    device,
    prelude::*, //
};

/// A feature bit.
///
/// # Invariants
///
/// The bit number is below 64.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Feature(c_uint);

impl Feature {
    /// The device complies with version 1 of the specification; a legacy device does not.
    pub(crate) const VERSION_1: Self = Self::new::<{ bindings::VIRTIO_F_VERSION_1 }>();
    /// The device reads and writes memory through an IOMMU or a platform that it must not go round.
    pub(crate) const ACCESS_PLATFORM: Self = Self::new::<{ bindings::VIRTIO_F_ACCESS_PLATFORM }>();
    /// A buffer may consist of several parts that are listed in memory of their own.
    pub(crate) const INDIRECT_DESC: Self = Self::new::<{ bindings::VIRTIO_RING_F_INDIRECT_DESC }>();

    /// Makes a feature of its bit number. One above 63 does not compile.
    pub(in crate::rust) const fn new<const BIT: c_uint>() -> Self {
        const { assert!(BIT < u64::BITS) };
        // INVARIANT: It was just checked.
        Self(BIT)
    }

    /// Returns a word with this bit set.
    pub(super) const fn mask(self) -> u64 {
        1u64.wrapping_shl(self.0)
    }
}

/// The features of a device while they are negotiated, for [`Driver::validate`].
///
/// # Invariants
///
/// `vdev` is a valid device, whose features no other code accesses for `'a`.
pub(crate) struct Features<'a> {
    vdev: *mut bindings::virtio_device,
    _life: PhantomData<&'a mut bindings::virtio_device>,
}

impl Features<'_> {
    /// Begins the negotiation with `vdev`.
    ///
    /// # Safety
    ///
    /// `vdev` must be a valid device, whose features no other code accesses for the lifetime of the
    /// result.
    pub(super) unsafe fn new(vdev: *mut bindings::virtio_device) -> Self {
        // INVARIANT: By the requirements of this function.
        Self {
            vdev,
            _life: PhantomData,
        }
    }

    fn bits(&self) -> &Cell<u64> {
        // SAFETY: By the type invariants: only this accesses the bits, and not from several threads.
        unsafe { &*features_of(self.vdev).cast::<Cell<u64>>() }
    }

    /// Returns whether the device offers `feature`, and the driver knows it and has not given it up.
    pub(crate) fn has(&self, feature: Feature) -> bool {
        self.bits().get() & feature.mask() != 0
    }

    /// Gives `feature` up.
    pub(crate) fn clear(&mut self, feature: Feature) {
        let bits = self.bits();

        bits.set(bits.get() & !feature.mask());
    }

    /// Returns whether the configuration space is long enough to have `field`.
    pub(crate) fn have_field(&self, field: Field<u32>) -> bool {
        // SAFETY: By the type invariants the device is valid.
        field.is_within(unsafe { transport::config_len(self.vdev) })
    }
}

impl AsRef<device::Device> for Features<'_> {
    /// Returns the device, for the log.
    fn as_ref(&self) -> &device::Device {
        // SAFETY: By the type invariants the device is valid, and so is the `struct device` in it.
        unsafe { device::Device::from_raw(&raw mut (*self.vdev).dev) }
    }
}

/// The byte order of what a device reads in buffers: little-endian, unless the device is a legacy
/// one.
#[derive(Clone, Copy)]
pub(crate) enum ByteOrder {
    /// Little-endian.
    Little,
    /// The guest's own.
    Native,
}

impl ByteOrder {
    /// Returns `value` in this byte order.
    pub(crate) fn to_device16(self, value: u16) -> u16 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }

    /// Returns `value` in this byte order.
    pub(crate) fn to_device32(self, value: u32) -> u32 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }

    /// Returns `value` in this byte order.
    pub(crate) fn to_device64(self, value: u64) -> u64 {
        match self {
            Self::Little => value.to_le(),
            Self::Native => value,
        }
    }
}
