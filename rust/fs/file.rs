// SPDX-License-Identifier: GPL-2.0

//! Files that the driver writes like an administrator, for functions that are not exported to
//! modules.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use crate::rust::bindings;

use core::ptr::{
    self,
    NonNull, //
};
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*, //
};

/// An open file.
///
/// # Invariants
///
/// The pointer is to an open file, with a reference that is released on drop.
pub(in crate::rust) struct WritableFile(NonNull<bindings::file>);

// SAFETY: A file may be written, and closed, from any thread.
unsafe impl Send for WritableFile {}

/// How many files were opened, failures included.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static OPENED: Atomic<usize> = Atomic::new(0);

impl WritableFile {
    /// Opens the file at `path` in the root file system of the first process: kernel threads have
    /// another root.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub(in crate::rust) fn open(path: &CStr) -> Result<Self> {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        OPENED.add(1, Relaxed);
        // SAFETY: The path is a C string.
        let file = from_err_ptr(unsafe {
            bindings::filp_open_as_init(path.as_char_ptr(), bindings::O_WRONLY as c_int)
        })?;

        // INVARIANT: The file was just opened.
        Ok(Self(NonNull::new(file).ok_or(ENOENT)?))
    }

    /// Writes `text`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub(in crate::rust) fn write(&self, text: &[u8]) -> Result {
        // SAFETY: By the type invariants; the buffer has this length.
        let written = unsafe {
            bindings::kernel_write(
                self.0.as_ptr(),
                text.as_ptr().cast(),
                text.len(),
                ptr::null_mut(),
            )
        };

        to_result(written.min(0) as c_int)
    }
}

impl Drop for WritableFile {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}
