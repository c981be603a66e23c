// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file that holds a guest's memory.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::size::Size;

/// QEMU's name for it.
const NAME: &str = "/memfd:memory-backend-memfd";

/// The unit of the number of blocks that a file has.
const BLOCK: u64 = 512;

/// The length of one write, which divides every contiguous range.
const CHUNK: Size = Size::mib(1);

/// The layout of a q35 machine's memory: up to some address the file offset is the address, and the
/// rest is at 4 GiB.
fn offset(address: Size, size: Size) -> Option<Size> {
    let low = match size < Size::mib(2816) {
        true => size,
        false => Size::gib(2),
    };
    if address < low {
        return Some(address);
    }
    (address >= Size::gib(4)).then(|| address - Size::gib(4) + low)
}

/// The memory of a guest whose memory backend is a file.
#[derive(Debug)]
pub struct MemoryFile(File);

impl MemoryFile {
    /// Opens one that has a name.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        Ok(Self(
            file.with_context(|| format!("opening {}", path.display()))?,
        ))
    }

    /// Opens that of a QEMU.
    pub(crate) fn of(qemu: u32) -> Result<Self> {
        for entry in fs::read_dir(format!("/proc/{qemu}/fd"))? {
            let path = entry?.path();
            let is_it = |target: std::path::PathBuf| target.to_string_lossy().starts_with(NAME);
            // QEMU may have closed it meanwhile.
            if fs::read_link(&path).is_ok_and(is_it) {
                return Self::open(&path);
            }
        }
        bail!("the guest's memory is in no file")
    }

    /// How much of the host's memory it uses.
    pub fn resident(&self) -> Result<Size> {
        Ok(Size::bytes(self.0.metadata()?.blocks() * BLOCK))
    }

    /// Fills `length` bytes from the guest-physical address `address` on, without the guest's
    /// knowledge.
    pub fn fill(&self, address: Size, length: Size, byte: u8) -> Result<()> {
        let end = address + length;
        let (mut address, size) = (address, Size::bytes(self.0.metadata()?.len()));
        let chunk = vec![byte; usize::try_from(CHUNK.as_bytes())?];
        while address < end {
            let part = CHUNK.min(end - address);
            let offset = offset(address, size).context("there is no memory at this address")?;
            let bytes = &chunk[..usize::try_from(part.as_bytes())?];
            self.0.write_all_at(bytes, offset.as_bytes())?;
            address = address + part;
        }
        Ok(())
    }

    /// Returns all of it to the host, which destroys the guest, and returns how long that took.
    pub fn punch(&self) -> Result<Duration> {
        let length = self.0.metadata()?.len();
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let start = Instant::now();
        fallocate(&self.0, flags, 0, length.try_into()?).context("punching the guest's memory")?;
        Ok(start.elapsed())
    }
}
