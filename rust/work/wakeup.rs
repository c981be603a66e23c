// SPDX-License-Identifier: GPL-2.0

//! Keeping the system awake while there is work for a device.
//!
//! C header: [`include/linux/pm_wakeup.h`](srctree/include/linux/pm_wakeup.h)

use crate::rust::virtio;

use kernel::{
    device::Core,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        }, //
    }, //
};

/// Why the system stays awake.
#[derive(Clone, Copy)]
pub(crate) enum WakeReason {
    /// The balloon has not reached the target.
    Target,
    /// The driver has not answered a request for statistics.
    Statistics,
}

/// The number of reasons.
const REASONS: usize = 2;

/// A device's wakeup source. It keeps the system awake as long as there is a reason, if the user
/// has enabled that for this device (`power/wakeup` in sysfs).
pub(crate) struct WakeupSource {
    dev: ARef<virtio::Device>,
    is_held: [Atomic<bool>; REASONS],
}

impl WakeupSource {
    /// Allows the user to enable it for `dev`. There is no reason yet.
    pub(crate) fn new(dev: &virtio::Device<Core<'_>>) -> Self {
        dev.set_wakeup_capable();
        Self {
            dev: (&**dev).into(),
            is_held: [const { Atomic::new(false) }; REASONS],
        }
    }

    /// Keeps the system awake for `reason`. Callable from any context.
    pub(crate) fn hold(&self, reason: WakeReason) {
        self.is_held[reason as usize].store(true, Release);
        self.dev.stay_awake();
    }

    /// Ends [`hold`](Self::hold) for `reason`, however often it was called.
    pub(crate) fn release(&self, reason: WakeReason) {
        self.is_held[reason as usize].xchg(false, Full);
        if self.is_needed() {
            return;
        }
        self.dev.relax();
        // There may be a reason again by now.
        if self.is_needed() {
            self.dev.stay_awake();
        }
    }

    fn is_needed(&self) -> bool {
        self.is_held.iter().any(|is_held| is_held.load(Acquire))
    }
}

impl Drop for WakeupSource {
    fn drop(&mut self) {
        self.dev.relax();
    }
}
