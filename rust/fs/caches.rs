// SPDX-License-Identifier: GPL-2.0

//! The kernel's caches of files.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use crate::rust::{
    fs::file::WritableFile,
    right::{
        Right,
        RightGuard, //
    }, //
};

use kernel::prelude::*;

static DROPPING: Right = Right::new();

/// The right to drop caches, which one caller at a time has.
pub(crate) struct CacheDropper {
    _right: RightGuard,
}

impl CacheDropper {
    /// Takes it, or returns none while another caller has it.
    pub(crate) fn begin() -> Option<Self> {
        DROPPING.take().map(|right| Self { _right: right })
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
