// SPDX-License-Identifier: GPL-2.0

//! Locks that all devices of the driver share.

use crate::rust::mm::pages::kept::Kept;

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        global_lock, //
    }, //
};

global_lock! {
    /// The reserve lock: held from the check of the available memory until the allocation.
    // SAFETY: `init` is called before any device is probed.
    pub(super) unsafe(uninit) static RESERVE: Mutex<()> = ();
}

global_lock! {
    /// Held while a contiguous range is allocated.
    // SAFETY: As above.
    pub(super) unsafe(uninit) static CONTIG: Mutex<()> = ();
}

global_lock! {
    /// Held by the thread that takes a memory block offline. The kernel isolates pageblocks for
    /// that, as for a contiguous range. If two threads do so at once, the one that fails ends the
    /// isolation of the other.
    // SAFETY: As above.
    pub(super) unsafe(uninit) static HOTPLUG: Mutex<()> = ();
}

global_lock! {
    /// Pages that came online.
    // SAFETY: As above.
    pub(super) unsafe(uninit) static KEPT: SpinLock<Kept> = Kept::new();
}

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
global_lock! {
    /// The OOM notifier that was registered last, if it is still registered.
    // SAFETY: As above.
    pub(in crate::rust) unsafe(uninit) static OOM_NOTIFIER: Mutex<Atomic<*mut c_void>> =
        Atomic::new(core::ptr::null_mut());
}

/// Makes the locks usable. To be called when the module is loaded; further calls have no effect.
pub(crate) fn init() {
    // A safe function may be called twice, and the locks must not be initialised twice.
    static IS_DONE: Atomic<bool> = Atomic::new(false);

    if !IS_DONE.xchg(true, Relaxed) {
        // SAFETY: This is done once.
        unsafe {
            RESERVE.init();
            CONTIG.init();
            HOTPLUG.init();
            KEPT.init();
            #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
            OOM_NOTIFIER.init();
        }
    }
}
