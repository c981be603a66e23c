// SPDX-License-Identifier: GPL-2.0

//! This module, or the kernel if the driver is built in.

use kernel::{
    bindings,
    prelude::*, //
};

#[cfg(MODULE)]
#[allow(improper_ctypes)] // The struct has fields of no size.
unsafe extern "C" {
    static __this_module: kernel::types::Opaque<bindings::module>;
}

/// The version for `modinfo`. `module!` has no field for it.
#[cfg(MODULE)]
#[link_section = ".modinfo"]
#[used(compiler)]
static VERSION: [u8; 14] = *b"version=0.2.0\0";

/// Returns the module, or null if the driver is built in.
#[cfg_attr(not(MODULE), allow(dead_code))]
pub(super) const fn as_ptr() -> *mut bindings::module {
    #[cfg(MODULE)]
    // SAFETY: The module exists; no reference to its content is made.
    return unsafe { __this_module.get() };
    #[cfg(not(MODULE))]
    core::ptr::null_mut()
}

/// A reference to the module.
pub(super) struct Reference(());

impl Reference {
    /// Takes one.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the module is being unloaded.
    pub(super) fn take() -> Result<Self> {
        #[cfg(all(MODULE, CONFIG_MODULE_UNLOAD))]
        // SAFETY: The module is there.
        if !unsafe { bindings::try_module_get(as_ptr()) } {
            return Err(ENODEV);
        }
        Ok(Self(()))
    }

    /// Releases it in a kernel thread, and ends the thread. The module may be unloaded as soon as
    /// the reference is gone: the rest is the kernel's code. With a built-in driver it returns 0.
    ///
    /// # Safety
    ///
    /// The thread must not hold values that have to be dropped.
    pub(super) unsafe fn release_and_exit(self) -> c_int {
        #[cfg(MODULE)]
        // SAFETY: This owns a reference, and does not release it twice, since the call does not
        // return.
        unsafe {
            bindings::__module_put_and_kthread_exit(as_ptr(), 0)
        };
        #[cfg(not(MODULE))]
        0
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        #[cfg(all(MODULE, CONFIG_MODULE_UNLOAD))]
        // SAFETY: There is a reference.
        unsafe {
            bindings::module_put(as_ptr())
        };
    }
}

/// Returns how many references to the module there are.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn references() -> i32 {
    #[cfg(all(MODULE, CONFIG_MODULE_UNLOAD))]
    // SAFETY: The module is there.
    return unsafe { bindings::module_refcount(as_ptr()) };
    #[cfg(not(all(MODULE, CONFIG_MODULE_UNLOAD)))]
    0
}
