// SPDX-License-Identifier: GPL-2.0

//! What interrupts, notifiers and settings have to report to the balloon's task.

#![forbid(unsafe_code)]

use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full,
    Relaxed,
    Release, //
};

/// Events that the task has not handled yet.
pub(super) struct Events {
    just_used: Atomic<bool>,
    target_changed: Atomic<bool>,
    settings_changed: Atomic<bool>,
    out_of_memory: Atomic<bool>,
}

impl Events {
    /// Returns the events of a new device: its target was not read yet.
    pub(super) fn new() -> Self {
        Self {
            just_used: Atomic::new(false),
            target_changed: Atomic::new(true),
            settings_changed: Atomic::new(false),
            out_of_memory: Atomic::new(false),
        }
    }

    /// The device has just used buffers.
    pub(super) fn queue_used(&self) {
        self.just_used.store(true, Relaxed);
    }

    /// Takes [`queue_used`](Self::queue_used).
    pub(super) fn take_queue_used(&self) -> bool {
        self.just_used.xchg(false, Relaxed)
    }

    /// The device has changed its configuration space, or the target could not be read.
    pub(super) fn target_changed(&self) {
        self.target_changed.store(true, Release);
    }

    /// Takes [`target_changed`](Self::target_changed).
    pub(super) fn take_target_changed(&self) -> bool {
        self.target_changed.xchg(false, Full)
    }

    /// Returns whether the target is to be read.
    pub(super) fn has_target_changed(&self) -> bool {
        self.target_changed.load(Acquire)
    }

    /// The settings have changed.
    pub(super) fn settings_changed(&self) {
        self.settings_changed.store(true, Release);
    }

    /// Takes [`settings_changed`](Self::settings_changed).
    pub(super) fn take_settings_changed(&self) -> bool {
        self.settings_changed.xchg(false, Full)
    }

    /// The guest has run out of memory.
    pub(super) fn out_of_memory(&self) {
        self.out_of_memory.store(true, Release);
    }

    /// Takes [`out_of_memory`](Self::out_of_memory).
    pub(super) fn take_out_of_memory(&self) -> bool {
        self.out_of_memory.xchg(false, Full)
    }
}
