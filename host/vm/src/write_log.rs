// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages of its memory a guest has written, as the plugin of `host/write-log` records it.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::size::Size;

/// Where the memory of the largest guest ends: with the hole below 4 GiB.
const END: Size = Size::gib(64);

/// A log of a guest's writes.
#[derive(Debug)]
pub struct WriteLog(NamedTempFile);

impl WriteLog {
    /// A log in which nothing was written.
    pub fn new() -> Result<Self> {
        let file = NamedTempFile::new()?;
        file.as_file().set_len(END.as_pages() / 8)?;
        Ok(Self(file))
    }

    /// The file, for QEMU.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Empties the log. The guest must be stopped.
    pub fn clear(&self) -> Result<()> {
        let mut file = self.0.as_file();
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&vec![0; usize::try_from(END.as_pages() / 8)?])?;
        Ok(())
    }

    /// The log: bit n of the whole stands for the 4 KiB page n of the guest's physical memory. The guest must be
    /// stopped.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut file = self.0.as_file();
        let mut bits = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut bits)?;
        Ok(bits)
    }
}
