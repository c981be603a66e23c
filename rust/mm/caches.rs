// SPDX-License-Identifier: GPL-2.0

//! The kernel's caches of files.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use crate::rust::bindings;

use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Release, //
    }, //
};

/// Whether a [`Dropping`] exists.
static IS_DROPPING: Atomic<bool> = Atomic::new(false);

/// The right to drop caches, which one at a time has.
pub(crate) struct Dropping(());

impl Dropping {
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

        // SAFETY: The path is a C string, the buffer has a length of 1, and the file is closed at
        // the end.
        unsafe {
            let file = from_err_ptr(bindings::balloon_rs_open_as_init(
                c"/proc/sys/vm/drop_caches".as_char_ptr(),
                bindings::O_WRONLY as c_int,
            ))?;
            let written = bindings::kernel_write(
                file,
                value.as_ptr().cast(),
                value.len(),
                core::ptr::null_mut(),
            );

            bindings::fput(file);
            if written < 0 {
                return Err(Error::from_errno(written as c_int));
            }
        }

        Ok(())
    }
}

impl Drop for Dropping {
    fn drop(&mut self) {
        IS_DROPPING.store(false, Release);
    }
}
