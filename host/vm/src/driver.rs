// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The drivers that a guest can load.

/// The drivers that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// This repository's.
    Rust,
    /// The kernel's own.
    C,
    /// This repository's, built to list memory in use as unused, and to hint it.
    Lying,
}

impl Driver {
    /// The file that has the module.
    pub fn file(self) -> &'static str {
        match self {
            Self::Rust => "virtio-balloon-rs.ko",
            Self::C => "virtio_balloon.ko",
            Self::Lying => "virtio-balloon-rs-lying.ko",
        }
    }

    /// The parameters for a reserve so small that the balloon can take nearly all memory.
    pub fn low_floor(self) -> &'static [&'static str] {
        match self {
            Self::C => &[],
            Self::Rust | Self::Lying => &["floor_mib=32"],
        }
    }

    /// The module's name, and the driver's on the virtio bus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rust | Self::Lying => "virtio_balloon_rs",
            Self::C => "virtio_balloon",
        }
    }
}
