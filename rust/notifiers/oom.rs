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

    #[cfg(not(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST))]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> =
        Some(bindings::register_oom_notifier);
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> =
        Some(last::register);

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        last::forget(block);
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

/// The notifier that was registered last, for tests: they cannot run out of memory.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod last {
    use super::*;
    use crate::rust::mm::locks::OOM_NOTIFIER;

    use core::ptr;
    use kernel::sync::atomic::Relaxed;

    /// # Safety
    ///
    /// As for the kernel's function.
    pub(super) unsafe extern "C" fn register(block: *mut bindings::notifier_block) -> c_int {
        let last = OOM_NOTIFIER.lock();
        // SAFETY: By the requirements of this function.
        let result = unsafe { bindings::register_oom_notifier(block) };

        if result == 0 {
            last.store(block.cast(), Relaxed);
        }
        result
    }

    /// A notifier is about to be unregistered.
    pub(super) fn forget(block: *mut bindings::notifier_block) {
        let last = OOM_NOTIFIER.lock();

        if last.load(Relaxed) == block.cast() {
            last.store(ptr::null_mut(), Relaxed);
        }
    }

    /// Calls it as the kernel does for an allocation that has failed. Returns how many pages it has given
    /// back.
    pub(crate) fn out_of_memory() -> usize {
        let last = OOM_NOTIFIER.lock();
        let block = last.load(Relaxed).cast::<bindings::notifier_block>();
        let mut pages: c_ulong = 0;

        if !block.is_null() {
            // SAFETY: The notifier is registered, at least for as long as the lock is held.
            unsafe {
                if let Some(call) = (*block).notifier_call {
                    call(block, 0, (&raw mut pages).cast());
                }
            }
        }
        pages as usize
    }
}
