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
pub(crate) enum Signal {
    /// The balloon has not reached the target.
    Target,
    /// The driver has not answered a request for statistics.
    Statistics,
}

/// The number of signals.
const SIGNALS: usize = 2;

/// A device's wakeup source. It keeps the system awake as long as a signal is raised, if the user
/// has enabled that for this device (`power/wakeup` in sysfs).
pub(crate) struct WakeupSource {
    dev: ARef<virtio::Device>,
    is_raised: [Atomic<bool>; SIGNALS],
}

impl WakeupSource {
    /// Allows the user to enable it for `dev`. No signal is raised.
    pub(crate) fn new(dev: &virtio::Device<Core<'_>>) -> Self {
        dev.set_wakeup_capable();
        Self {
            dev: (&**dev).into(),
            is_raised: [const { Atomic::new(false) }; SIGNALS],
        }
    }

    /// Raises `signal`. Callable from any context.
    pub(crate) fn raise(&self, signal: Signal) {
        self.is_raised[signal as usize].store(true, Release);
        self.dev.stay_awake();
    }

    /// Takes `signal` back, however often it was raised.
    pub(crate) fn lower(&self, signal: Signal) {
        self.is_raised[signal as usize].xchg(false, Full);
        if self.is_needed() {
            return;
        }
        self.dev.relax();
        // A signal may have been raised in between.
        if self.is_needed() {
            self.dev.stay_awake();
        }
    }

    fn is_needed(&self) -> bool {
        self.is_raised
            .iter()
            .any(|is_raised| is_raised.load(Acquire))
    }
}

impl Drop for WakeupSource {
    fn drop(&mut self) {
        self.dev.relax();
    }
}
