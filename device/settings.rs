// SPDX-License-Identifier: GPL-2.0

//! The settings of a device: module parameters are the defaults, and sysfs changes them at run time
//! ([`attributes`](crate::device::attributes)).

#![forbid(unsafe_code)]

use crate::{
    bitmap::{
        Encoding,
        Encodings, //
    },
    rust::mm::memory, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The module's parameters. The crate's root declares them, with a line for each that `modinfo`
/// shows.
pub(crate) struct Parameters {
    /// `inflate`: whether the balloon follows the target; it stays empty if not. Default: true.
    inflate: bool,
    /// `encoding`: how messages describe pages, for measurements. Default: 0.
    pub(crate) wire_format: WireFormat,
    /// `memory_blocks`: whether the driver may take memory blocks offline and online, if the kernel
    /// zeroes the memory that it allocates. Default: true.
    memory_blocks: bool,
    /// `floor_mib`: the available memory below which the balloon does not grow, and no hints are
    /// given. Default: -1.
    floor: Floor,
}

impl Parameters {
    /// Returns the parameters with these values.
    ///
    /// # Errors
    ///
    /// `EINVAL` if one has no legal value. The error is logged.
    pub(crate) fn new(
        inflate: bool,
        encoding: u8,
        memory_blocks: bool,
        floor_mib: i32,
    ) -> Result<Self> {
        let wire_format = WireFormat::from_parameter(encoding).ok_or_else(|| {
            pr_err!("encoding={encoding}: give 0, the number of an encoding, or {PFNS}\n");
            EINVAL
        })?;
        let floor = Floor::new(floor_mib).ok_or_else(|| {
            pr_err!("floor_mib={floor_mib}: give a number of MiB, or -1\n");
            EINVAL
        })?;

        Ok(Self {
            inflate,
            wire_format,
            memory_blocks,
            floor,
        })
    }
}

/// How messages describe pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireFormat {
    /// As page sets, each in the shortest of these encodings.
    PageSets(Encodings),
    /// As arrays of page frame numbers.
    Pfns,
}

/// The values of the module parameter `encoding` that are not the number of an encoding.
const SHORTEST: u8 = 0;
const PFNS: u8 = u8::MAX;

const _: () = assert!(
    Encoding::from_number(SHORTEST).is_none() && Encoding::from_number(PFNS).is_none(),
    "the value has two meanings"
);

impl WireFormat {
    /// Returns the format for a value of the module parameter `encoding`.
    const fn from_parameter(encoding: u8) -> Option<Self> {
        match (encoding, Encoding::from_number(encoding)) {
            (SHORTEST, _) => Some(Self::PageSets(Encodings::ALL)),
            (PFNS, _) => Some(Self::Pfns),
            (_, Some(encoding)) => Some(Self::PageSets(Encodings::only(encoding))),
            (_, None) => None,
        }
    }

    /// Returns whether page sets may be negotiated.
    pub(crate) fn has_page_sets(self) -> bool {
        self != Self::Pfns
    }

    /// Returns the encodings that page sets may have.
    fn encodings(self) -> Encodings {
        match self {
            Self::PageSets(encodings) => encodings,
            Self::Pfns => Encodings::ALL,
        }
    }
}

/// The available memory below which the balloon does not grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Floor(i32);

impl Floor {
    /// Returns a floor of `mib` MiB, or one that depends on the guest's memory if `mib` is -1.
    pub(crate) fn new(mib: i32) -> Option<Self> {
        (mib >= -1).then_some(Self(mib))
    }
}

/// Returns the reserve in kernel pages of a guest with `present` pages: 8 MiB, and a part of its
/// memory that decreases with its size. In a guest of 1 GiB it has room for the page descriptors
/// (`struct page`) of 14 times as much plugged memory.
pub(crate) fn default_floor(present: usize) -> usize {
    const MIB: usize = 1 << (20 - PAGE_SHIFT);
    /// The limits in MiB, and the part of memory up to each limit, as a divisor.
    const PARTS: [(usize, usize); 5] = [
        (128, 2),
        (512, 4),
        (2_048, 8),
        (8_192, 16),
        (usize::MAX, 32),
    ];
    let mut floor = 8 * MIB;
    let mut start = 0;

    for (end, parts) in PARTS {
        let end = end.saturating_mul(MIB).min(present);
        floor += end.saturating_sub(start) / parts;
        start = end;
    }

    floor
}

/// The settings of a device.
pub(crate) struct Settings {
    floor_mib: Atomic<i32>,
    inflate: Atomic<bool>,
    memory_blocks: bool,
    encodings: Encodings,
}

impl Settings {
    /// Returns the settings of the module's parameters.
    pub(crate) fn new(parameters: Parameters) -> Self {
        Self {
            floor_mib: Atomic::new(parameters.floor.0),
            inflate: Atomic::new(parameters.inflate),
            memory_blocks: parameters.memory_blocks,
            encodings: parameters.wire_format.encodings(),
        }
    }

    /// Returns the encodings that page sets may have, if the device accepts them.
    pub(crate) fn encodings(&self) -> Encodings {
        self.encodings
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
            Err(_) => default_floor(memory::present_pages()),
        }
    }

    /// Sets it.
    pub(crate) fn set_floor(&self, floor: Floor) {
        self.floor_mib.store(floor.0, Relaxed);
    }

    /// Returns whether the balloon follows the target. Otherwise it stays empty.
    pub(crate) fn inflate(&self) -> bool {
        self.inflate.load(Relaxed)
    }

    /// Sets it.
    pub(crate) fn set_inflate(&self, inflate: bool) {
        self.inflate.store(inflate, Relaxed);
    }

    /// Returns whether the driver may take memory blocks offline if the kernel zeroes pages. It
    /// does not change at run time.
    pub(crate) fn memory_blocks(&self) -> bool {
        self.memory_blocks
    }
}
