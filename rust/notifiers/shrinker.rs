// SPDX-License-Identifier: GPL-2.0

//! A shrinker: frees memory during reclaim.
//!
//! C header: [`include/linux/shrinker.h`](srctree/include/linux/shrinker.h)

use crate::rust::bindings;

use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// An owner of pages that it can free at once.
pub(crate) trait Shrink: Send + Sync {
    /// Returns how many pages (kernel pages) can be freed.
    fn count(&self) -> usize;

    /// Frees about `wanted` pages, and returns their number.
    ///
    /// Called from any allocation. It must neither allocate nor sleep, and must not take a lock
    /// under which other code allocates.
    fn scan(&self, wanted: usize) -> usize;
}

/// The registration of a [`Shrink`], which is called for as long as this exists.
///
/// # Invariants
///
/// `shrinker` is registered, with callbacks for `T`, and `_who` as its data.
pub(crate) struct Shrinker<T: Shrink> {
    shrinker: NonNull<bindings::shrinker>,
    _who: Arc<T>,
}

// SAFETY: A shrinker may be freed from any thread, and `T` is `Send` and `Sync`.
unsafe impl<T: Shrink> Send for Shrinker<T> {}

// SAFETY: There is nothing that can be done with a shared reference.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers `who` under `name`, which debugfs may show.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(who: Arc<T>, name: &'static CStr) -> Result<Self> {
        // SAFETY: Both strings are static and null-terminated, and "%s" takes one string.
        let shrinker =
            unsafe { bindings::shrinker_alloc(0, c"%s".as_char_ptr(), name.as_char_ptr()) };
        let shrinker = NonNull::new(shrinker).ok_or(ENOMEM)?;
        let data: *const T = &*who;

        // SAFETY: The shrinker was just allocated, and is registered once it is complete. The data
        // lives until the shrinker was freed, since `who` does.
        //
        // INVARIANT: The shrinker is registered here.
        unsafe {
            (*shrinker.as_ptr()).count_objects = Some(Self::count);
            (*shrinker.as_ptr()).scan_objects = Some(Self::scan);
            (*shrinker.as_ptr()).private_data = data.cast_mut().cast();
            bindings::shrinker_register(shrinker.as_ptr());
        }

        Ok(Self {
            shrinker,
            _who: who,
        })
    }

    /// Returns the owner for a callback.
    ///
    /// # Safety
    ///
    /// `shrinker` must be one that [`new`](Self::new) has registered, and must not be freed for
    /// `'a`.
    unsafe fn who<'a>(shrinker: *mut bindings::shrinker) -> &'a T {
        // SAFETY: By the requirements of this function. By the type invariants the data is of this
        // type, and lives as long as the shrinker.
        unsafe { &*(*shrinker).private_data.cast::<T>() }
    }

    /// # Safety
    ///
    /// Only for the kernel's shrinkers, which call it with one that [`new`](Self::new) has
    /// registered, and do not free that meanwhile.
    unsafe extern "C" fn count(
        shrinker: *mut bindings::shrinker,
        _control: *mut bindings::shrink_control,
    ) -> c_ulong {
        // SAFETY: By the requirements of this function.
        unsafe { Self::who(shrinker) }.count()
    }

    /// # Safety
    ///
    /// As for [`count`](Self::count); `control` must be valid, and no other code may use it.
    unsafe extern "C" fn scan(
        shrinker: *mut bindings::shrinker,
        control: *mut bindings::shrink_control,
    ) -> c_ulong {
        // SAFETY: By the requirements of this function.
        let (who, control) = unsafe { (Self::who(shrinker), &mut *control) };
        let wanted = control.nr_to_scan;
        let freed = who.scan(wanted);

        // Otherwise a block of a thousand pages would count as the hundred requested ones. Reclaim
        // would not see the freed memory, and continue until nothing is left.
        control.nr_scanned = freed.max(wanted);
        bindings::mm_account_reclaimed_pages(freed);
        freed
    }
}

impl<T: Shrink> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the shrinker is registered. When this returns no callback
        // runs.
        unsafe { bindings::shrinker_free(self.shrinker.as_ptr()) };
    }
}
