// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that the host has allocated for the guest.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::Device;
use crate::memory::hazard::Hazard;

/// The unit of [`MetadataExt::blocks`], in bytes.
const BLOCK: u64 = 512;

impl Device {
    /// The memory that the host has allocated for the guest, in bytes: the blocks of its files. Nothing without a VMM, and
    /// nothing for files on a disk, whose blocks are not in memory.
    pub fn resident(&self) -> Option<u64> {
        let mut files = BTreeMap::new();
        for region in self.memory.memory().iter() {
            let file = region.file_offset()?.file();
            if Hazard::of_file(file) == Some(Hazard::DiskFile) {
                return None;
            }
            let metadata = file.metadata().ok()?;
            files.insert((metadata.dev(), metadata.ino()), metadata.blocks());
        }
        let blocks: u64 = files.values().sum();
        (!files.is_empty()).then_some(blocks * BLOCK)
    }
}
