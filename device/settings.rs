// SPDX-License-Identifier: GPL-2.0

//! What the guest's administrator decides for a device: module parameters are the defaults, and
//! sysfs changes them at run time ([`attributes`](crate::device::attributes)).

#![forbid(unsafe_code)]

use crate::{
    balloon::target,
    module_parameters,
    rust::mm::memory, //
};

use kernel::{
    page::PAGE_SHIFT,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The settings of a device.
pub(crate) struct Settings {
    floor_mib: Atomic<i32>,
    inflate: Atomic<bool>,
    memory_blocks: bool,
}

impl Settings {
    /// Returns what the module's parameters say.
    pub(crate) fn from_parameters() -> Self {
        Self {
            floor_mib: Atomic::new(module_parameters::floor_mib.value()),
            inflate: Atomic::new(module_parameters::inflate.value()),
            memory_blocks: module_parameters::memory_blocks.value(),
        }
    }

    /// Returns the available memory below which the balloon does not grow, in MiB; -1 if it depends
    /// on the guest's memory.
    pub(crate) fn floor_mib(&self) -> i32 {
        self.floor_mib.load(Relaxed)
    }

    /// Returns the same in kernel pages.
    pub(crate) fn floor_pages(&self) -> usize {
        match usize::try_from(self.floor_mib()) {
            Ok(mib) => mib << (20 - PAGE_SHIFT),
            Err(_) => target::floor(memory::present_pages()),
        }
    }

    pub(crate) fn set_floor_mib(&self, floor_mib: i32) {
        self.floor_mib.store(floor_mib, Relaxed);
    }

    /// Returns whether the balloon follows the target. If not it stays empty.
    pub(crate) fn inflate(&self) -> bool {
        self.inflate.load(Relaxed)
    }

    pub(crate) fn set_inflate(&self, inflate: bool) {
        self.inflate.store(inflate, Relaxed);
    }

    /// Returns whether the driver may take memory blocks offline where the kernel zeroes pages. It
    /// does not change at run time.
    pub(crate) fn memory_blocks(&self) -> bool {
        self.memory_blocks
    }
}
