// SPDX-License-Identifier: GPL-2.0

//! Files that show something, in debugfs.
//!
//! The `kernel` crate's files belong to no module: when one of them is open while the module is
//! unloaded, the kernel calls what is not there any more. Whoever has one of these open keeps the
//! module.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use crate::rust::bindings;

use core::{
    ops::Deref,
    ptr, //
};
use kernel::{
    container_of,
    fmt,
    prelude::*,
    seq_file::{
        seq_print,
        SeqFile, //
    },
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// Something that can be shown.
pub(crate) trait Show: Send + Sync {
    /// Writes it, in whole lines. May sleep.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

impl<T: Show> Show for Arc<T> {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::show(self, f)
    }
}

impl Show for Atomic<u64> {
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.load(Relaxed))
    }
}

/// A directory, which is there for as long as this or a file in it exists.
#[derive(Clone)]
pub(crate) struct Dir(Arc<RawDir>);

/// # Invariants
///
/// It is what creating a directory has returned: a directory, or an error, which all functions of
/// debugfs take.
struct RawDir(*mut bindings::dentry);

// SAFETY: A directory may be used from any thread.
unsafe impl Send for RawDir {}

// SAFETY: As above.
unsafe impl Sync for RawDir {}

impl Drop for RawDir {
    fn drop(&mut self) {
        remove(self.0);
    }
}

impl Dir {
    /// Makes a directory. If there cannot be one, there will be no files either.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr) -> Result<Self> {
        #[cfg(not(CONFIG_DEBUG_FS))]
        let dir = {
            let _ = name;
            ptr::null_mut()
        };
        #[cfg(CONFIG_DEBUG_FS)]
        // SAFETY: The name is a string.
        let dir = unsafe { bindings::debugfs_create_dir(name.as_char_ptr(), ptr::null_mut()) };
        // INVARIANT: It is what the function returns.
        let dir = RawDir(dir);

        Ok(Self(Arc::new(dir, GFP_KERNEL)?))
    }

    /// Returns an initialiser for a file in it that shows `what`.
    pub(crate) fn file<T: Show>(
        &self,
        name: &'static CStr,
        what: T,
    ) -> impl PinInit<File<T>> + use<'_, T> {
        pin_init!(&this in File {
            what,
            raw <- Opaque::new(RawFile {
                show: File::<T>::callback,
            }),
            // The last one but for what keeps the directory: the callback may come at once.
            //
            // INVARIANT: It is what the function returns.
            dentry: {
                #[cfg(not(CONFIG_DEBUG_FS))]
                let dentry = {
                    let _ = (name, this);
                    ptr::null_mut()
                };
                #[cfg(CONFIG_DEBUG_FS)]
                // SAFETY: The name is a string, and the directory is there. What is shown stays where
                // it is until the file is removed.
                let dentry = unsafe {
                    let raw = Opaque::cast_into(&raw const (*this.as_ptr()).raw);

                    bindings::debugfs_create_file_full(
                        name.as_char_ptr(),
                        0o400,
                        self.0.0,
                        raw.cast(),
                        ptr::null(),
                        &OPERATIONS.0,
                    )
                };
                dentry
            },
            _dir: self.clone(),
        })
    }
}

/// A file that shows a `T`.
///
/// # Invariants
///
/// `dentry` is what creating a file has returned, for the callback of a `File<T>` with `raw`: a
/// file, or an error.
#[pin_data(PinnedDrop)]
pub(crate) struct File<T: Show> {
    what: T,
    #[pin]
    raw: Opaque<RawFile>,
    dentry: *mut bindings::dentry,
    _dir: Dir,
}

// SAFETY: A file may be removed from any thread, and `T` is `Send` and `Sync`.
unsafe impl<T: Show> Send for File<T> {}

// SAFETY: `what` is only accessed through a shared reference.
unsafe impl<T: Show> Sync for File<T> {}

impl<T: Show> Deref for File<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.what
    }
}

impl<T: Show> File<T> {
    /// # Safety
    ///
    /// `raw` must be that of a live `File<T>`, and `m` a sequence that no other thread uses.
    unsafe fn callback(m: *mut bindings::seq_file, raw: *mut RawFile) {
        // SAFETY: By the requirements of this function.
        let (this, m) = unsafe {
            (
                &*container_of!(Opaque::cast_from(raw), Self, raw),
                SeqFile::from_raw(m),
            )
        };

        seq_print!(m, "{}", Shown(&this.what));
    }
}

#[pinned_drop]
impl<T: Show> PinnedDrop for File<T> {
    fn drop(self: Pin<&mut Self>) {
        remove(self.dentry);
    }
}

/// What can be formatted, since it can be shown.
struct Shown<'a, T>(&'a T);

impl<T: Show> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show(f)
    }
}

/// What the kernel knows of a file.
struct RawFile {
    show: unsafe fn(*mut bindings::seq_file, *mut RawFile),
}

/// The operations of all files, which keep the module for as long as one is open.
#[cfg(CONFIG_DEBUG_FS)]
struct Operations(bindings::file_operations);

#[cfg(CONFIG_DEBUG_FS)]
// SAFETY: The operations are only read.
unsafe impl Sync for Operations {}

#[cfg(CONFIG_DEBUG_FS)]
static OPERATIONS: Operations = Operations(bindings::file_operations {
    owner: crate::rust::this_module::as_ptr(),
    open: Some(open),
    read: Some(bindings::seq_read),
    llseek: Some(bindings::seq_lseek),
    release: Some(bindings::single_release),
    ..pin_init::zeroed()
});

#[cfg(CONFIG_DEBUG_FS)]
extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: The kernel opens a file that `create_file` has made.
    unsafe { bindings::single_open(file, Some(show), (*inode).i_private) }
}

#[cfg(CONFIG_DEBUG_FS)]
extern "C" fn show(m: *mut bindings::seq_file, _: *mut c_void) -> c_int {
    // SAFETY: `open` has passed what `create_file` has, which is there as long as the file.
    unsafe {
        let raw: *mut RawFile = (*m).private.cast();

        ((*raw).show)(m, raw);
    }
    0
}

/// Removes a file or directory, if it is one. When this returns no operation runs.
fn remove(dentry: *mut bindings::dentry) {
    #[cfg(CONFIG_DEBUG_FS)]
    // SAFETY: By the type invariants of the callers' types it is what creating it has returned.
    unsafe {
        bindings::debugfs_remove(dentry)
    };
    #[cfg(not(CONFIG_DEBUG_FS))]
    let _ = dentry;
}
