// SPDX-License-Identifier: GPL-2.0

//! Files that show something, in debugfs.
//!
//! The `kernel` crate's files have no owner: if one of them is open while the module is unloaded,
//! the kernel later calls code that is gone. With these files, an open file holds the module.
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

/// A value that can be shown.
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

/// A directory, which exists for as long as this or a file in it exists.
#[derive(Clone)]
pub(crate) struct Dir(Arc<Dentry>);

/// A directory or a file, which is removed on drop. No operation runs after that.
///
/// # Invariants
///
/// It is the result of creating it: a directory, a file, or an error, which all functions of
/// debugfs accept.
struct Dentry(*mut bindings::dentry);

// SAFETY: Directories and files may be used from any thread.
unsafe impl Send for Dentry {}

// SAFETY: As above.
unsafe impl Sync for Dentry {}

impl Drop for Dentry {
    fn drop(&mut self) {
        #[cfg(CONFIG_DEBUG_FS)]
        // SAFETY: By the type invariants.
        unsafe {
            bindings::debugfs_remove(self.0)
        };
    }
}

impl Dir {
    /// Makes a directory. If that fails, there will be no files either.
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
        let dir = Dentry(dir);

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
            // The last field except the one that holds the directory, since the kernel may call
            // back at once.
            //
            // INVARIANT: It is what the function returns.
            dentry: {
                #[cfg(not(CONFIG_DEBUG_FS))]
                let dentry = {
                    let _ = (name, this);
                    ptr::null_mut()
                };
                #[cfg(CONFIG_DEBUG_FS)]
                // SAFETY: The name is a string, and the directory exists. The shown value is pinned
                // until the file is removed.
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
                Dentry(dentry)
            },
            _dir: self.clone(),
        })
    }
}

/// A file that shows a `T`.
///
/// # Invariants
///
/// `dentry` is for the callback of a `File<T>` with `raw`.
#[pin_data]
pub(crate) struct File<T: Show> {
    /// The first field, since it is dropped first.
    dentry: Dentry,
    what: T,
    #[pin]
    raw: Opaque<RawFile>,
    _dir: Dir,
}

// SAFETY: The callback may be called from any thread, and `T` is `Send` and `Sync`.
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

/// Formats a value that can be shown.
struct Shown<'a, T>(&'a T);

impl<T: Show> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show(f)
    }
}

/// The kernel's data of a file.
struct RawFile {
    show: unsafe fn(*mut bindings::seq_file, *mut RawFile),
}

/// The operations of all files, which hold the module while a file is open.
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

/// # Safety
///
/// Only for debugfs, which calls it when it opens a file that [`Dir::file`] has created.
#[cfg(CONFIG_DEBUG_FS)]
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: By the requirements of this function.
    unsafe { bindings::single_open(file, Some(show), (*inode).i_private) }
}

/// # Safety
///
/// Only for debugfs, which calls it for a file that [`open`] has opened and that was not removed.
#[cfg(CONFIG_DEBUG_FS)]
unsafe extern "C" fn show(m: *mut bindings::seq_file, _: *mut c_void) -> c_int {
    // SAFETY: By the requirements of this function. `open` has passed what `Dir::file` has.
    unsafe {
        let raw: *mut RawFile = (*m).private.cast();

        ((*raw).show)(m, raw);
    }
    0
}
