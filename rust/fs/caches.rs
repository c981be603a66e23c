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

/// Whether a [`CacheDropper`] exists.
static IS_DROPPING: Atomic<bool> = Atomic::new(false);

/// The right to drop caches, which one at a time has.
pub(crate) struct CacheDropper(());

impl CacheDropper {
    /// Takes it, or returns none while another caller has it.
    pub(crate) fn begin() -> Option<Self> {
        (!IS_DROPPING.xchg(true, Acquire)).then_some(Self(()))
    }

    /// Drops what is clean in the page cache, or in the caches of names and inodes, or in both. May
    /// take any time; `SIGKILL` cuts short what asks file systems for something.
    ///
    /// What does it is not exported to modules: it is asked for as an administrator would.
    ///
    /// # Errors
    ///
    /// What opening or writing `/proc/sys/vm/drop_caches` says: `ENOENT` if /proc is not there.
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
