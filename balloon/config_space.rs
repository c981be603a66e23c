// SPDX-License-Identifier: GPL-2.0

//! The balloon's fields of the configuration space: the target, the size and the stop reason.
//!
//! An access costs a VM exit, and QEMU may abort on it if the device is gone (docs/reliability.md).
//! So the fields are read and written only when they may have changed. To a device that accepts
//! them in messages, the driver sends the size and the stop reason instead.

#![forbid(unsafe_code)]

use crate::{
    balloon::policy::stop_reason::StopReason,
    device::timeouts,
    messages::{
        balloon_page,
        message::MessageQueue, //
    },
    rust::{
        virtio,
        virtio_balloon::{
            self,
            stop_reason,
            Status,
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
    /// Whether the device accepts the size and the stop reason in messages.
    has_messages: bool,
    /// When a field was read, written or sent last.
    accessed: Instant<Monotonic>,
    /// Since when no read of the target has succeeded, if the latest read has failed.
    unread: Option<Instant<Monotonic>>,
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
            has_messages: dev.has_feature(virtio_balloon::F_STATUS),
            accessed: Instant::now(),
            unread: None,
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

        let since = self.unread.take().unwrap_or(self.accessed);
        let target = self
            .config
            .read_le32(virtio_balloon::NUM_PAGES)
            .inspect_err(|_| self.unread = Some(since))?;
        Ok(core::mem::replace(&mut self.target, target) != target)
    }

    /// Returns whether reads of the target have failed for so long that the device counts as
    /// unresponsive.
    pub(super) fn is_unreadable(&self) -> bool {
        self.unread
            .is_some_and(|since| since.elapsed() > timeouts::UNRESPONSIVE)
    }

    /// Returns whether a size that still changes is to be reported again.
    pub(super) fn is_report_due(&self) -> bool {
        self.accessed.elapsed() > timeouts::REPORT_INTERVAL
    }

    /// Returns whether the size and the stop reason may be reported at any time. Otherwise they may
    /// only when the device has just responded.
    pub(super) fn may_always_report(&self) -> bool {
        self.has_messages
    }

    /// Reports the balloon's size in kernel pages, and why it is below the target, if they have
    /// changed. A message, if the device accepts one, goes to the queue `inflate`. If there is no
    /// room for it, the next call sends it.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is gone.
    pub(super) fn report<M>(
        &mut self,
        size: usize,
        reason: Option<StopReason>,
        inflate: &mut MessageQueue<M>,
    ) -> Result {
        let actual = balloon_page::balloon_pages(size);
        let reason = self.reason.map(|_| StopReason::value(reason));

        if self.has_messages {
            self.send(actual, reason, inflate);
        } else {
            self.write(actual, reason)?;
        }
        self.accessed = Instant::now();
        Ok(())
    }

    fn send<M>(&mut self, actual: u32, reason: Option<u32>, inflate: &mut MessageQueue<M>) {
        if (self.actual, self.reason) == (Some(actual), reason) {
            return;
        }

        let status = Status::new(actual, reason.unwrap_or(stop_reason::NONE));
        if inflate.send_status(&status).is_ok() {
            (self.actual, self.reason) = (Some(actual), reason);
        }
    }

    fn write(&mut self, actual: u32, reason: Option<u32>) -> Result {
        if self.actual != Some(actual) {
            self.config.write_le32(virtio_balloon::ACTUAL, actual)?;
            self.actual = Some(actual);
        }
        if let Some(changed) = reason.filter(|_| self.reason != reason) {
            self.config.write_le32(STOP_REASON, changed)?;
            self.reason = reason;
        }
        Ok(())
    }
}
