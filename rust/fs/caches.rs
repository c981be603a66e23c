// SPDX-License-Identifier: GPL-2.0

//! The kernel's caches of files.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use crate::rust::fs::file::WritableFile;

use kernel::{
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Release, //
    }, //
};

/// Whether a [`CacheDropper`] exists. A mutex cannot serve here: one thread takes the right, and
/// another one releases it.
static IS_DROPPING: Atomic<bool> = Atomic::new(false);

/// The right to drop caches, which one caller at a time has.
pub(crate) struct CacheDropper(());

impl CacheDropper {
    /// Takes it, or returns none while another caller has it.
    pub(crate) fn begin() -> Option<Self> {
        (!IS_DROPPING.xchg(true, Acquire)).then_some(Self(()))
    }

    /// Drops the clean page cache, or the caches of names and inodes, or both. The duration is
    /// unbounded, since file systems are involved; `SIGKILL` shortens it.
    ///
    /// The function behind it is not exported to modules, so this writes to the administrator's
    /// interface.
    ///
    /// # Errors
    ///
    /// The error of opening or writing `/proc/sys/vm/drop_caches`: `ENOENT` without /proc.
    pub(crate) fn drop_caches(&self, pages: bool, slab: bool) -> Result {
        let value = [b'0' + u8::from(pages) + 2 * u8::from(slab)];

        WritableFile::open(c"/proc/sys/vm/drop_caches")?.write(&value)
    }
}

impl Drop for CacheDropper {
    fn drop(&mut self) {
        IS_DROPPING.store(false, Release);
    }
}
