// SPDX-License-Identifier: GPL-2.0

//! This module, or the kernel if the driver is built in.

use kernel::{
    bindings,
    types::Opaque, //
};

#[cfg(MODULE)]
#[allow(improper_ctypes)] // The struct has fields of no size.
unsafe extern "C" {
    static __this_module: Opaque<bindings::module>;
}

/// Returns the module, or null if the driver is built in.
pub(super) const fn as_ptr() -> *mut bindings::module {
    #[cfg(MODULE)]
    // SAFETY: The module is there; no reference to what is in it is made.
    return unsafe { __this_module.get() };
    #[cfg(not(MODULE))]
    core::ptr::null_mut()
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
