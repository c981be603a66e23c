// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The resident memory of a VM: the blocks of its memory files, which the daemon has open, or what its process has.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use procfs::process::{Process, Status};

/// The interval at which the manager searches missing files again.
const RETRY: Duration = Duration::from_secs(30);

/// The memory files of a VM, once they are known.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    files: Vec<PathBuf>,
    /// The search for the files, and its time.
    last: Option<(i32, u64, Instant)>,
    /// The process whose memory is that of the VM, which is in no file.
    process: Option<i32>,
}

/// Takes what a VM's task and the manager share.
pub(crate) fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// In bytes, for the VM that shares so many bytes with this process or a child of it. Nothing without permission
    /// to read its files, or if they do not have that size.
    pub(crate) fn resident(&mut self, pid: i32, shared: u64) -> Option<u64> {
        let known = self.blocks(shared);
        if known.is_some() {
            return known;
        }
        let failed = self.last.is_some_and(|(old, size, time)| {
            (old, size) == (pid, shared) && time.elapsed() < RETRY
        });
        if failed {
            return None;
        }
        self.last = Some((pid, shared, Instant::now()));
        self.process = None;
        self.files = find(pid, shared);
        self.blocks(shared)
    }

    /// The same for a VM whose memory is in no file: all that the process has.
    pub(crate) fn of_process(&mut self, pid: i32) -> Option<u64> {
        self.process = Some(pid);
        of_process(pid)
    }

    /// The same again, where it was found last.
    pub(crate) fn again(&self) -> Option<u64> {
        let (_, shared, _) = self.last?;
        self.blocks(shared).or_else(|| of_process(self.process?))
    }

    fn blocks(&self, shared: u64) -> Option<u64> {
        let (mut size, mut blocks) = (0, 0);
        for file in &self.files {
            let metadata = fs::metadata(file).ok()?;
            size += metadata.len();
            blocks += metadata.blocks() * 512;
        }
        (size == shared && shared > 0).then_some(blocks)
    }
}

/// What a process has of the host's memory, in swap or not, in bytes: the memory of a VM that is in no file, and the
/// process's own.
fn of_process(pid: i32) -> Option<u64> {
    let status = Process::new(pid).and_then(|process| process.status());
    allocated(&status.ok()?)
}

fn allocated(status: &Status) -> Option<u64> {
    let kib = status.vmrss?.saturating_add(status.vmswap.unwrap_or(0));
    Some(kib.saturating_mul(1024))
}

/// Whether the blocks of a file are in memory or in swap. Those of a disk's image are not.
fn is_in_memory(path: &Path) -> bool {
    let kind = statfs(path).map(|stat| stat.filesystem_type());
    matches!(kind, Ok(TMPFS_MAGIC | HUGETLBFS_MAGIC))
}

/// The largest files in memory that the process or its children have open, each one once, as many as have `shared` bytes
/// together. The daemon has smaller files of its own, such as its program.
fn find(pid: i32, shared: u64) -> Vec<PathBuf> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let processes = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok());
    let mut files = BTreeMap::new();
    for process in processes.chain([pid]) {
        let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else {
            continue;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if metadata.is_file() && is_in_memory(&path) {
                files
                    .entry((metadata.dev(), metadata.ino()))
                    .or_insert((metadata.len(), path));
            }
        }
    }
    let mut files: Vec<_> = files.into_values().collect();
    files.sort_by_key(|(size, _)| Reverse(*size));
    let mut rest = shared;
    let fits = |(size, _): &(u64, PathBuf)| {
        let fits = *size > 0 && *size <= rest;
        rest -= if fits { *size } else { 0 };
        fits
    };
    let files = files.into_iter().filter(fits);
    files.map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_blocks_of_the_memory_file_count() {
        let file = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
        // No other file of this process has that size.
        let size = (64 << 20) + 12_345 * 4096;
        file.set_len(size).unwrap();
        file.write_all_at(&[1; 8192], 1 << 20).unwrap();
        // A program that the daemon has open.
        let other = File::from(memfd_create("program", MFdFlags::empty()).unwrap());
        other.set_len(3 << 20).unwrap();
        let mut memory = Memory::default();
        let pid = std::process::id().try_into().unwrap();
        assert_eq!(memory.resident(pid, size), Some(8192));
        assert_eq!(memory.again(), Some(8192));
        assert_eq!(memory.blocks(size + 1), None);
        assert_eq!(Memory::default().blocks(0), None);
    }

    #[test]
    fn an_image_of_a_disk_is_no_memory() {
        // The sources are on a disk.
        let image = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).unwrap();
        let size = image.metadata().unwrap().len();
        let pid = std::process::id().try_into().unwrap();
        assert_eq!(Memory::default().resident(pid, size), None);
    }

    #[test]
    fn memory_in_swap_counts() {
        let mut status = Process::myself().unwrap().status().unwrap();
        (status.vmrss, status.vmswap) = (Some(400), Some(100));
        assert_eq!(allocated(&status), Some(500 << 10));
        let pid = std::process::id().try_into().unwrap();
        assert!(of_process(pid) > Some(0));
    }

    #[test]
    fn files_that_were_not_found_are_not_looked_for_all_the_time() {
        let pid = std::process::id().try_into().unwrap();
        let mut memory = Memory::default();
        assert_eq!(memory.resident(pid, 1), None);
        let first = memory.last;
        assert_eq!(memory.resident(pid, 1), None);
        assert_eq!(memory.last, first);
        assert_eq!(memory.resident(pid, 2), None);
        assert_ne!(memory.last, first);
    }
}
