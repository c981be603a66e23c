// SPDX-License-Identifier: GPL-2.0

//! The negotiation of features.
//!
//! C header: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use crate::rust::virtio::bus::{
    device::Device,
    feature_bit::FeatureBit,
    field::Field, //
};

use core::cell::Cell;
use kernel::device::{
    self,
    Bound, //
};

/// The features of a device during their negotiation, for [`Driver::validate`].
///
/// # Invariants
///
/// No other code accesses the features of `dev` for `'a`.
pub(crate) struct Negotiation<'a> {
    dev: &'a Device<Bound>,
}

impl<'a> Negotiation<'a> {
    /// Begins the negotiation with `dev`.
    ///
    /// # Safety
    ///
    /// No other code may access the features of `dev` for the lifetime of the result.
    pub(in crate::rust::virtio) unsafe fn new(dev: &'a Device<Bound>) -> Self {
        // INVARIANT: By the requirements of this function.
        Self { dev }
    }

    fn bits(&self) -> &Cell<u64> {
        // SAFETY: By the type invariants: only this accesses the bits, and not from several
        // threads.
        unsafe { &*self.dev.features().cast::<Cell<u64>>() }
    }

    /// Returns whether the device offers `feature`, and the driver knows it and has not given it
    /// up.
    pub(crate) fn has(&self, feature: FeatureBit) -> bool {
        self.bits().get() & feature.mask() != 0
    }

    /// Gives `feature` up.
    pub(crate) fn clear(&mut self, feature: FeatureBit) {
        let bits = self.bits();

        bits.set(bits.get() & !feature.mask());
    }

    /// Returns whether the configuration space is long enough to have `field`.
    pub(crate) fn have_field(&self, field: Field<u32>) -> bool {
        field.is_within(self.dev.config_len(self.has(FeatureBit::VERSION_1)))
    }
}

impl AsRef<device::Device> for Negotiation<'_> {
    /// Returns the device, for the log.
    fn as_ref(&self) -> &device::Device {
        let dev: &Device = self.dev;

        dev.as_ref()
    }
}
