// SPDX-License-Identifier: GPL-2.0

//! The notifier for memory that is taken offline.
//!
//! C header: [`include/linux/memory.h`](srctree/include/linux/memory.h)

use crate::rust::{
    bindings,
    mm::{
        hotplug::{
            exclusion,
            online::{
                is_taking,
                range_can_be_taken, //
            }, //
        },
        pfn_range::PfnRange, //
    },
    notifiers::notifier::{
        Chain,
        Notifier, //
    }, //
};

use kernel::prelude::*;

/// An owner of memory that the kernel cannot migrate while the device has messages about it.
pub(crate) trait GoingOffline: Send + Sync {
    /// The kernel has isolated memory. Waits until the kernel can migrate the pages of this there,
    /// or frees them.
    ///
    /// Called in process context.
    ///
    /// # Errors
    ///
    /// The memory stays online.
    fn going_offline(&self) -> Result;

    /// The memory is offline, or stays online.
    ///
    /// Called in process context, each time after [`going_offline`](Self::going_offline), whatever
    /// that has returned.
    fn offline_over(&self) {}
}

/// The notifier chain of memory hotplug.
pub(crate) struct MemoryChain;

/// The registration of a [`GoingOffline`], which is called for as long as this exists.
pub(crate) type OfflineNotifier<T> = Notifier<MemoryChain, T>;

// SAFETY: The functions are those of one chain, which calls with a `struct memory_notify` before
// memory goes offline, and has stopped when the second one returns.
unsafe impl<T: GoingOffline> Chain<T> for MemoryChain {
    #[cfg(CONFIG_MEMORY_HOTPLUG)]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> =
        Some(bindings::register_memory_notifier);
    #[cfg(not(CONFIG_MEMORY_HOTPLUG))]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> = None;

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        #[cfg(CONFIG_MEMORY_HOTPLUG)]
        // SAFETY: By the requirements of this function.
        unsafe {
            bindings::unregister_memory_notifier(block)
        };
        #[cfg(not(CONFIG_MEMORY_HOTPLUG))]
        let _ = block;
    }

    unsafe fn call(who: &T, action: c_ulong, data: *mut c_void) -> c_int {
        // SAFETY: The chain passes the address of a `struct memory_notify`.
        let what = unsafe { &*data.cast::<bindings::memory_notify>() };
        let Some(pfns) = PfnRange::new(what.start_pfn as u64, what.nr_pages as u64) else {
            return bindings::NOTIFY_DONE as c_int;
        };

        // Blocks that this driver takes offline contain no pages of a balloon. But another device
        // may have allocated pages there before the kernel isolated the block, and the kernel would
        // wait for these pages with its locks for memory hotplug held.
        if is_taking() {
            exclusion::end_offlining();
            let is_taken =
                action != bindings::BALLOON_MEM_GOING_OFFLINE || range_can_be_taken(pfns);

            return match is_taken {
                true => bindings::NOTIFY_DONE as c_int,
                false => refuse(EBUSY),
            };
        }

        match action {
            bindings::BALLOON_MEM_GOING_OFFLINE => (),
            bindings::BALLOON_MEM_OFFLINE | bindings::BALLOON_MEM_CANCEL_OFFLINE => {
                exclusion::end_offlining();
                who.offline_over();
                return bindings::NOTIFY_OK as c_int;
            }
            _ => return bindings::NOTIFY_DONE as c_int,
        }

        match exclusion::begin_offlining().and_then(|()| who.going_offline()) {
            Ok(()) => bindings::NOTIFY_OK as c_int,
            Err(error) => refuse(error),
        }
    }
}

/// Returns the value for the chain that makes the kernel fail with `error`. virtio-mem's driver
/// expects `EBUSY` or `ENOMEM`, and warns of others.
fn refuse(error: Error) -> c_int {
    bindings::NOTIFY_STOP_MASK as c_int | (bindings::NOTIFY_OK as c_int - error.to_errno())
}
