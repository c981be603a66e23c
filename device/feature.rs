// SPDX-License-Identifier: GPL-2.0

//! Features: the functions of a device, independent of each other.
//!
//! All features have the same life cycle: a feature is probed, and from then on called through
//! [`Feature`]. To add one, add a file with an implementation, and an entry in the list of the
//! crate's root.

#![forbid(unsafe_code)]

use crate::{
    device::{
        queues::Queues,
        settings::Settings, //
    },
    rust::{
        fs::debugfs,
        virtio,
        work::{
            task::TaskQueue,
            wakeup::WakeupSource, //
        }, //
    }, //
};

use kernel::{
    device::Core,
    prelude::*,
    sync::Arc,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// A feature of a device. All functions have defaults: to do nothing.
pub(crate) trait Feature: Send + Sync {
    /// The device is ready: buffers may be made available.
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {}

    /// The device has used buffers of a queue that the feature has taken. Runs in interrupt
    /// context.
    fn queue_used(&self) {}

    /// The device has changed its configuration space. Runs in interrupt context.
    fn config_changed(&self) {}

    /// The guest's administrator has changed a setting.
    fn settings_changed(&self) {}

    /// Returns the memory to the page allocator, and ends all work. For when the device is about to
    /// be reset: the driver is unbound and the feature will be dropped, or the system suspends.
    ///
    /// All features have [`timeouts::TEARDOWN`](crate::device::timeouts::TEARDOWN) together, from
    /// `begin` on.
    ///
    /// # Errors
    ///
    /// Any error means that the device did not respond in time.
    fn quiesce(&self, _begin: Instant<Monotonic>) -> Result {
        Ok(())
    }

    /// Ends all work, and leaves the memory where it is: the system shuts down.
    fn shutdown(&self) {}

    /// The device was reset after [`quiesce`](Self::quiesce). Frees the buffers that the device
    /// still owned.
    fn after_reset(&self) {}

    /// Continues with the same device after a reset: takes its queues out of `queues`.
    ///
    /// # Errors
    ///
    /// The driver does not use the device any more.
    fn restore(&self, _dev: &virtio::Device<Core<'_>>, _queues: &mut Queues<'_>) -> Result {
        Ok(())
    }

    /// The device is not restored after [`quiesce`](Self::quiesce). Continues with work that needs
    /// no device.
    fn give_up(&self) {}

    /// Returns the balloon's status, if this feature is the balloon.
    fn status(&self) -> Option<&dyn Status> {
        None
    }
}

/// The status of a balloon, for sysfs.
pub(crate) trait Status {
    /// Returns the device's target in kernel pages.
    fn target(&self) -> usize;

    /// Returns the balloon's size in kernel pages. Pages that the guest cannot use yet count.
    fn size(&self) -> usize;

    /// Returns why the balloon is below the target, as a word.
    fn stop_reason(&self) -> &'static str;
}

/// The environment of a feature's probe.
pub(crate) struct Setup<'a, 'core> {
    pub(crate) dev: &'a virtio::Device<Core<'core>>,
    pub(crate) queues: Queues<'a>,
    /// The workqueue of the feature's task.
    pub(crate) tasks: Arc<TaskQueue>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) wakeup: Arc<WakeupSource>,
    /// The debugfs directory of the feature's counters.
    pub(crate) dir: debugfs::Dir,
}

/// Sets up a feature, or returns `None` if it was not negotiated.
pub(crate) type Probe = fn(&mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>>;
