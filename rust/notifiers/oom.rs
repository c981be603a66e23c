// SPDX-License-Identifier: GPL-2.0

//! The OOM notifier: frees memory before the kernel kills a process.
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

/// An owner of memory that it can free.
pub(crate) trait OomNotify: Send + Sync {
    /// The kernel calls larger priorities first.
    const PRIORITY: c_int;

    /// Frees memory, and returns the number of pages.
    ///
    /// Called in process context, for a failed allocation, under the lock of the OOM killer. It
    /// must not allocate, and must not take a lock under which other code allocates.
    fn out_of_memory(&self) -> usize;
}

/// The chain of the OOM killer.
pub(crate) struct OomChain;

/// The registration of an [`OomNotify`], which is called for as long as this exists.
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

        // SAFETY: The OOM killer passes the address of an `unsigned long`.
        unsafe {
            let freed = data.cast::<c_ulong>();

            *freed = (*freed).saturating_add(pages as c_ulong);
        };

        bindings::NOTIFY_OK as c_int
    }
}

/// The notifier that was registered last, for tests, which cannot run out of memory.
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

    /// Returns its priority, if there is one.
    pub(crate) fn priority() -> Option<c_int> {
        let last = OOM_NOTIFIER.lock();
        let block = last.load(Relaxed).cast::<bindings::notifier_block>();

        // SAFETY: The notifier is registered, at least for as long as the lock is held.
        unsafe { block.as_ref() }.map(|block| block.priority)
    }

    /// Calls it as the kernel does for a failed allocation. Returns how many pages it has freed.
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
