// SPDX-License-Identifier: GPL-2.0

//! Files that show something, in debugfs.
//!
//! The `kernel` crate's files belong to no module: when one of them is open while the module is
//! unloaded, the kernel calls what is not there any more. Whoever has one of these open keeps the
//! module.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use crate::rust::bindings;

use core::ops::Deref;
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
        // SAFETY: By the type invariants. No file is left in it.
        unsafe { bindings::balloon_rs_remove_shown(self.0) };
    }
}

impl Dir {
    /// Makes a directory. If there cannot be one, there will be no files either.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr) -> Result<Self> {
        // SAFETY: The name is a string.
        //
        // INVARIANT: It is what the function returns.
        let dir = RawDir(unsafe { bindings::balloon_rs_create_dir(name.as_char_ptr()) });

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
            raw <- Opaque::new(bindings::balloon_rs_shown {
                show: Some(File::<T>::callback),
            }),
            // The last one but for what keeps the directory: the callback may come at once.
            //
            // SAFETY: The name is a string, and the directory is there. What is shown stays where
            // it is until the file is removed.
            //
            // INVARIANT: It is what the function returns.
            dentry: unsafe {
                bindings::balloon_rs_create_shown(
                    name.as_char_ptr(),
                    self.0.0,
                    Opaque::cast_into(&raw const (*this.as_ptr()).raw),
                )
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
    raw: Opaque<bindings::balloon_rs_shown>,
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
    extern "C" fn callback(m: *mut bindings::seq_file, shown: *mut bindings::balloon_rs_shown) {
        // SAFETY: By the type invariants it is part of a live `File<T>`, and nobody else uses the
        // sequence.
        let (this, m) = unsafe {
            (
                &*container_of!(Opaque::cast_from(shown), Self, raw),
                SeqFile::from_raw(m),
            )
        };

        seq_print!(m, "{}", Shown(&this.what));
    }
}

#[pinned_drop]
impl<T: Show> PinnedDrop for File<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants. When this returns the callback does not run.
        unsafe { bindings::balloon_rs_remove_shown(self.dentry) };
    }
}

/// What can be formatted, since it can be shown.
struct Shown<'a, T>(&'a T);

impl<T: Show> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show(f)
    }
}
