// SPDX-License-Identifier: GPL-2.0

//! Being asked for memory before a process is killed for it.
//!
//! C header: [`include/linux/oom.h`](srctree/include/linux/oom.h)

use crate::rust::{
    bindings,
    notifiers::notifier::{
        Chain,
        Notifier, //
    }, //
};

use kernel::prelude::*;

/// Somebody who can give memory back.
pub(crate) trait OomNotify: Send + Sync {
    /// Those with larger ones are asked first.
    const PRIORITY: c_int;

    /// Gives memory back, and returns how many pages it was.
    ///
    /// Called in process context, on behalf of an allocation that has failed, under the lock of the
    /// out-of-memory killer: it must not allocate, and no lock must be taken under which others
    /// allocate.
    fn out_of_memory(&self) -> usize;
}

/// The chain of the out-of-memory killer.
pub(crate) struct OomChain;

/// The registration of an [`OomNotify`], which is asked for as long as this exists.
pub(crate) type OomNotifier<T> = Notifier<OomChain, T>;

// SAFETY: The functions are those of one chain, which calls with the address of an `unsigned long`,
// and has stopped when the second one returns.
unsafe impl<T: OomNotify> Chain<T> for OomChain {
    const PRIORITY: c_int = T::PRIORITY;

    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> =
        Some(bindings::register_oom_notifier);

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        // SAFETY: By the requirements of this function.
        unsafe { bindings::unregister_oom_notifier(block) };
    }

    unsafe fn call(who: &T, _action: c_ulong, data: *mut c_void) -> c_int {
        let pages = who.out_of_memory();

        // SAFETY: The out-of-memory killer passes the address of an `unsigned long`.
        unsafe {
            let freed = data.cast::<c_ulong>();

            *freed = (*freed).saturating_add(pages as c_ulong);
        };

        bindings::NOTIFY_OK as c_int
    }
}
