// SPDX-License-Identifier: GPL-2.0

//! Unbind, suspend and shutdown of a device, and its return from suspend.
//!
//! The virtio layer resets the device after [`BoundDevice::quiesce`] and [`BoundDevice::shutdown`].
//! An unbind and a suspend take the same steps. After an unbind the layer drops the
//! [`BoundDevice`].

#![forbid(unsafe_code)]

use crate::{
    device::{
        bound_device::BoundDevice,
        queues::Queues, //
    },
    rust::virtio, //
};

use kernel::{
    device::Core,
    prelude::*,
    sync::atomic::Relaxed,
    time::Instant, //
};

impl BoundDevice {
    /// Returns the balloon's memory, and ends all work: the driver is unbound, or the system
    /// suspends. The host need not keep its state of the balloon during a suspend, and a
    /// hibernation image must not lack memory.
    pub(crate) fn quiesce(&self) {
        let begin = Instant::now();

        for feature in &self.features {
            if feature.quiesce(begin).is_err() {
                self.is_unresponsive.store(true, Relaxed);
            }
        }
    }

    /// Frees the buffers that the device still owned before its reset: after a suspend it may take
    /// long until the device is restored, or fail.
    pub(crate) fn after_reset(&self) {
        self.features
            .iter()
            .for_each(|feature| feature.after_reset());
    }

    /// Continues after a suspend with the same device.
    ///
    /// # Errors
    ///
    /// The driver does not use the device any more.
    pub(crate) fn restore(&self, dev: &virtio::Device<Core<'_>>) -> Result {
        self.restore_features(dev)
            .inspect_err(|_| self.features.iter().for_each(|feature| feature.give_up()))
    }

    fn restore_features(&self, dev: &virtio::Device<Core<'_>>) -> Result {
        // QEMU exits when a device without its back end is started.
        if self.is_unresponsive.load(Relaxed) {
            dev_warn!(
                dev,
                "the device did not respond before the suspend: no more ballooning until the driver is bound again\n"
            );
            return Err(ENODEV);
        }

        let mut queues = Queues::find(dev, &self.traffic)?;

        for feature in &self.features {
            feature.restore(dev, &mut queues)?;
        }
        Ok(())
    }

    /// Ends all work, and leaves the memory where it is.
    pub(crate) fn shutdown(&self) {
        self.features.iter().for_each(|feature| feature.shutdown());
    }
}
