// SPDX-License-Identifier: GPL-2.0

//! What the guest's administrator decides for a device: module parameters are the defaults, and
//! sysfs changes them at run time ([`attributes`](crate::device::attributes)).

#![forbid(unsafe_code)]

use crate::{
    balloon::target,
    bitmap::Encoding,
    rust::mm::memory, //
};

use kernel::{
    page::PAGE_SHIFT,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The module's parameters.
pub(crate) struct Parameters {
    pub(crate) inflate: bool,
    /// How pages are described: 0 in as few bytes as possible, or one of the constants below.
    pub(crate) encoding: u8,
    pub(crate) memory_blocks: bool,
    pub(crate) floor_mib: i32,
}

impl Parameters {
    /// Page sets are ranges.
    const RANGES: u8 = 1;
    /// Page sets are bitmaps.
    const BITMAPS: u8 = 2;
    /// No page sets, but arrays of page frame numbers.
    const PFNS: u8 = 3;

    /// Returns whether page sets are not to be negotiated.
    pub(crate) fn forbids_page_sets(&self) -> bool {
        self.encoding == Self::PFNS
    }
}

/// The settings of a device.
pub(crate) struct Settings {
    floor_mib: Atomic<i32>,
    inflate: Atomic<bool>,
    memory_blocks: bool,
    encoding: Option<Encoding>,
}

impl Settings {
    /// Begins with what the module's parameters say.
    pub(crate) fn new(parameters: Parameters) -> Self {
        Self {
            floor_mib: Atomic::new(parameters.floor_mib),
            inflate: Atomic::new(parameters.inflate),
            memory_blocks: parameters.memory_blocks,
            encoding: match parameters.encoding {
                Parameters::RANGES => Some(Encoding::Ranges),
                Parameters::BITMAPS => Some(Encoding::Bitmap),
                _ => None,
            },
        }
    }

    /// Returns the encoding that page sets must have, if there is one.
    pub(crate) fn encoding(&self) -> Option<Encoding> {
        self.encoding
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

    /// Sets it.
    pub(crate) fn set_floor_mib(&self, floor_mib: i32) {
        self.floor_mib.store(floor_mib, Relaxed);
    }

    /// Returns whether the balloon follows the target. If not it stays empty.
    pub(crate) fn inflate(&self) -> bool {
        self.inflate.load(Relaxed)
    }

    /// Sets it.
    pub(crate) fn set_inflate(&self, inflate: bool) {
        self.inflate.store(inflate, Relaxed);
    }

    /// Returns whether the driver may take memory blocks offline where the kernel zeroes pages. It
    /// does not change at run time.
    pub(crate) fn memory_blocks(&self) -> bool {
        self.memory_blocks
    }
}
