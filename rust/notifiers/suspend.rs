// SPDX-License-Identifier: GPL-2.0

//! The notifier for system suspend.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use crate::rust::{
    bindings,
    notifiers::notifier::{
        Chain,
        Notifier, //
    }, //
};

use kernel::prelude::*;

/// An object that would prevent a suspend unless it is notified.
pub(crate) trait SuspendNotify: Send + Sync {
    /// The system is about to suspend or to hibernate. Processes and freezable workqueues are
    /// frozen next.
    ///
    /// Called in process context, and may sleep.
    fn before_suspend(&self);

    /// Processes run again, after a suspend or a failed one.
    fn after_suspend(&self);
}

/// The notifier chain of system suspend.
pub(crate) struct SuspendChain;

/// The registration of a [`SuspendNotify`], which is called for as long as this exists.
pub(crate) type SuspendNotifier<T> = Notifier<SuspendChain, T>;

// SAFETY: The functions are those of one chain, which has stopped when the second one returns. Its
// data are not used.
unsafe impl<T: SuspendNotify> Chain<T> for SuspendChain {
    #[cfg(CONFIG_PM_SLEEP)]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> =
        Some(bindings::register_pm_notifier);
    #[cfg(not(CONFIG_PM_SLEEP))]
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int> = None;

    unsafe fn unregister(block: *mut bindings::notifier_block) {
        #[cfg(CONFIG_PM_SLEEP)]
        // SAFETY: By the requirements of this function.
        unsafe {
            bindings::unregister_pm_notifier(block);
        }
        #[cfg(not(CONFIG_PM_SLEEP))]
        let _ = block;
    }

    unsafe fn call(who: &T, action: c_ulong, _data: *mut c_void) -> c_int {
        // CAST: These are small numbers.
        match action as u32 {
            bindings::PM_SUSPEND_PREPARE
            | bindings::PM_HIBERNATION_PREPARE
            | bindings::PM_RESTORE_PREPARE => who.before_suspend(),
            _ => who.after_suspend(),
        }

        bindings::NOTIFY_OK as c_int
    }
}
