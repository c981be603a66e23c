// SPDX-License-Identifier: GPL-2.0

//! Feature bits.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::bindings;

use kernel::prelude::*;

/// A feature bit.
///
/// # Invariants
///
/// The bit number is below 64.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FeatureBit(c_uint);

impl FeatureBit {
    /// The device complies with version 1 of the specification; a legacy device does not.
    pub(crate) const VERSION_1: Self = Self::new::<{ bindings::VIRTIO_F_VERSION_1 }>();
    /// The device accesses memory through an IOMMU or with other platform restrictions.
    pub(crate) const ACCESS_PLATFORM: Self = Self::new::<{ bindings::VIRTIO_F_ACCESS_PLATFORM }>();
    /// A buffer may be described by an indirect table of descriptors.
    pub(crate) const INDIRECT_DESC: Self = Self::new::<{ bindings::VIRTIO_RING_F_INDIRECT_DESC }>();

    /// Makes a feature of its bit number. A number above 63 does not compile.
    pub(in crate::rust) const fn new<const BIT: c_uint>() -> Self {
        const { assert!(BIT < u64::BITS) };
        // INVARIANT: It was just checked.
        Self(BIT)
    }

    /// Returns a word with this bit set.
    pub(in crate::rust::virtio) const fn mask(self) -> u64 {
        1u64.wrapping_shl(self.0)
    }
}

/// The byte order in buffers: little-endian, unless the device is a legacy one.
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
