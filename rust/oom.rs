// SPDX-License-Identifier: GPL-2.0

//! Being asked for memory before a process is killed for it.
//!
//! C header: [`include/linux/oom.h`](srctree/include/linux/oom.h)

use super::bindings;

use kernel::{
    container_of,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Somebody who can give memory back.
pub(crate) trait OomNotify: Send + Sync {
    /// Gives memory back, and returns how many pages it was.
    ///
    /// Called in process context, on behalf of an allocation that has failed, under the lock of the
    /// out-of-memory killer: it must not allocate, and no lock must be taken under which others allocate.
    fn out_of_memory(&self) -> usize;
}

/// The registration of an [`OomNotify`], which is asked for as long as this exists.
///
/// # Invariants
///
/// `block` is registered, with a callback for a `OomNotifier<T>`.
#[pin_data(PinnedDrop)]
pub(crate) struct OomNotifier<T: OomNotify> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    who: Arc<T>,
}

// SAFETY: A notifier block may be unregistered from any thread, and `T` is `Send` and `Sync`.
unsafe impl<T: OomNotify> Send for OomNotifier<T> {}

// SAFETY: `who` is only accessed through a shared reference.
unsafe impl<T: OomNotify> Sync for OomNotifier<T> {}

impl<T: OomNotify> OomNotifier<T> {
    /// Returns an initialiser for a registration of `who`.
    ///
    /// # Errors
    ///
    /// What `register_oom_notifier` says.
    pub(crate) fn new(who: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            who,
            // The last field that is initialised: the callback may come at once.
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes, and stays where it is until it is unregistered.
                unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(Self::callback),
                        next: core::ptr::null_mut(),
                        priority: 0,
                    });
                    to_result(bindings::register_oom_notifier(slot))
                }
            }),
        })
    }

    extern "C" fn callback(
        block: *mut bindings::notifier_block,
        _action: c_ulong,
        freed: *mut c_void,
    ) -> c_int {
        // SAFETY: By the type invariants the block is part of a live `OomNotifier<T>`.
        let this = unsafe { &*container_of!(Opaque::cast_from(block), Self, block) };
        let pages = this.who.out_of_memory();

        // SAFETY: The out-of-memory killer passes the address of an `unsigned long`.
        unsafe {
            let freed = freed.cast::<c_ulong>();

            *freed = (*freed).saturating_add(pages as c_ulong);
        };

        bindings::NOTIFY_OK as c_int
    }
}

#[pinned_drop]
impl<T: OomNotify> PinnedDrop for OomNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the block is registered. When this returns the callback does not run.
        unsafe { bindings::unregister_oom_notifier(self.block.get()) };
    }
}
