// SPDX-License-Identifier: GPL-2.0

//! The test device as a memory balloon.

use crate::rust::{
    mm::hotplug::memory_block::VIRTIO_MEM,
    virtio::{
        fake_device::{
            FakeDevice,
            OnKick,
            Request, //
        },
        FeatureBit, //
    },
    virtio_balloon::DEVICE_ID, //
};

use kernel::prelude::*;

impl FakeDevice {
    /// Registers a balloon that offers `features`. When this returns, the driver has bound to it,
    /// or refused it.
    pub(crate) fn new(features: &[FeatureBit]) -> Result<Self> {
        Self::register(DEVICE_ID, features, None)
    }

    /// The same for a balloon that calls `on_kick`.
    pub(crate) fn with_callback(features: &[FeatureBit], on_kick: OnKick) -> Result<Self> {
        Self::register(DEVICE_ID, features, Some(on_kick))
    }

    /// Registers a virtio-mem device, to which no driver binds.
    pub(crate) fn virtio_mem() -> Result<Self> {
        Self::register_unusable(VIRTIO_MEM)
    }
}

impl Request {
    /// Returns the message as page frame numbers.
    pub(crate) fn pfns(&self) -> Result<KVec<u32>> {
        let mut pfns = KVec::with_capacity(self.words.len() / 2, GFP_KERNEL)?;

        for number in self.words.as_bytes().chunks_exact(size_of::<u32>()) {
            let number = u32::from_ne_bytes(number.try_into().map_err(|_| EINVAL)?);

            pfns.push(self.byte_order.to_native32(number), GFP_KERNEL)?;
        }

        Ok(pfns)
    }
}
