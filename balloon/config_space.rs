// SPDX-License-Identifier: GPL-2.0

//! The balloon's fields of the configuration space: the target, the size and the stop reason.
//!
//! An access costs a VM exit, and QEMU may abort on it if the device is gone (docs/reliability.md).
//! So the fields are read and written only when they may have changed.

#![forbid(unsafe_code)]

use crate::{
    balloon::policy::stop_reason::StopReason,
    device::timeouts,
    messages::balloon_page,
    rust::{
        virtio,
        virtio_balloon::{
            self,
            stop_reason,
            STOP_REASON, //
        }, //
    }, //
};

use kernel::{
    device::Core,
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// The fields, with the values that were read or written last.
pub(super) struct ConfigSpace {
    config: virtio::Config,
    /// The target in balloon pages.
    target: u32,
    /// The size in balloon pages.
    actual: Option<u32>,
    /// The stop reason as a number of the protocol; none if the device has no such field.
    reason: Option<u32>,
    /// When a field was read or written last.
    accessed: Instant<Monotonic>,
}

impl ConfigSpace {
    /// Begins with a device that was reset.
    ///
    /// # Errors
    ///
    /// The error of [`virtio::Device::config`].
    pub(super) fn new(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
        Ok(Self {
            config: dev.config()?,
            target: 0,
            actual: None,
            // A device that was reset has none (docs/protocol.md, SR-V1).
            reason: dev
                .has_feature(virtio_balloon::F_STOP_REASON)
                .then_some(stop_reason::NONE),
            accessed: Instant::now(),
        })
    }

    /// Returns the target in balloon pages, as it was read last.
    pub(super) fn target(&self) -> u32 {
        self.target
    }

    /// Reads the target. Returns whether it has changed.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the device is changing it, otherwise as for [`virtio::Config::read_le32`].
    pub(super) fn read_target(&mut self) -> Result<bool> {
        self.accessed = Instant::now();

        let target = self.config.read_le32(virtio_balloon::NUM_PAGES)?;
        Ok(core::mem::replace(&mut self.target, target) != target)
    }

    /// Returns whether a size that still changes is to be reported again.
    pub(super) fn is_report_due(&self) -> bool {
        self.accessed.elapsed() > timeouts::REPORT_INTERVAL
    }

    /// Reports the balloon's size in kernel pages, and why it is below the target, if they have
    /// changed. For when the device has just responded.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone.
    pub(super) fn report(&mut self, size: usize, reason: Option<StopReason>) -> Result {
        let actual = balloon_page::balloon_pages(size);

        if self.actual != Some(actual) {
            self.config.write_le32(virtio_balloon::ACTUAL, actual)?;
            self.actual = Some(actual);
        }
        let reason = StopReason::value(reason);
        if self.reason.is_some_and(|reported| reported != reason) {
            self.config.write_le32(STOP_REASON, reason)?;
            self.reason = Some(reason);
        }
        self.accessed = Instant::now();
        Ok(())
    }
}
