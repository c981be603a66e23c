// SPDX-License-Identifier: GPL-2.0

//! Registrations on the kernel's notifier chains.
//!
//! C header: [`include/linux/notifier.h`](srctree/include/linux/notifier.h)

use crate::rust::bindings;

use core::marker::PhantomData;
use kernel::{
    container_of,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// A notifier chain that can call a `T`.
///
/// # Safety
///
/// - When `REGISTER` has returned 0, the chain calls the block's callback with the block, and with
///   data that `call` accepts, until `unregister` returns.
/// - The block is not accessed after that, or if `REGISTER` has failed.
pub(crate) unsafe trait Chain<T> {
    /// The chain calls larger priorities first.
    const PRIORITY: c_int = 0;

    /// Puts a block on the chain. The block must be initialised, and stay valid and pinned until it
    /// is unregistered. Returns 0, or an error. `None` if the kernel has no such chain.
    const REGISTER: Option<unsafe extern "C" fn(*mut bindings::notifier_block) -> c_int>;

    /// Takes a block off the chain.
    ///
    /// # Safety
    ///
    /// The block must be registered.
    unsafe fn unregister(block: *mut bindings::notifier_block);

    /// Calls `who`. Returns a value for the chain.
    ///
    /// # Safety
    ///
    /// `action` and `data` must be the chain's arguments of its callbacks.
    unsafe fn call(who: &T, action: c_ulong, data: *mut c_void) -> c_int;
}

/// The registration of a `T` on the chain `C`, as long as this exists.
///
/// # Invariants
///
/// `block` is registered on `C`, with a callback for a `Notifier<C, T>`.
#[pin_data(PinnedDrop)]
pub(crate) struct Notifier<C: Chain<T>, T> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    who: Arc<T>,
    _chain: PhantomData<C>,
}

// SAFETY: A notifier block may be unregistered from any thread.
unsafe impl<C: Chain<T>, T: Send + Sync> Send for Notifier<C, T> {}

// SAFETY: `who` is only accessed through a shared reference.
unsafe impl<C: Chain<T>, T: Send + Sync> Sync for Notifier<C, T> {}

impl<C: Chain<T>, T> Notifier<C, T> {
    /// Returns an initialiser for a registration of `who`.
    ///
    /// # Errors
    ///
    /// The error of the registration.
    pub(crate) fn new(who: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            who,
            _chain: PhantomData,
            // The last field that is initialised, since the kernel may call back at once.
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes, and pinned until it is unregistered.
                unsafe {
                    slot.write(bindings::notifier_block {
                        notifier_call: Some(Self::callback),
                        next: core::ptr::null_mut(),
                        priority: C::PRIORITY,
                    });
                    C::REGISTER.map_or(Ok(()), |register| to_result(register(slot)))
                }
            }),
        })
    }

    /// # Safety
    ///
    /// Only for the chain `C`, which calls it with the block of a `Notifier<C, T>`.
    unsafe extern "C" fn callback(
        block: *mut bindings::notifier_block,
        action: c_ulong,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: By the requirements of this function. By the type invariants the block is part of
        // a live `Notifier<C, T>`.
        unsafe {
            let this = &*container_of!(Opaque::cast_from(block), Self, block);

            C::call(&this.who, action, data)
        }
    }
}

#[pinned_drop]
impl<C: Chain<T>, T> PinnedDrop for Notifier<C, T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the block is registered. When this returns the callback
        // does not run.
        unsafe { C::unregister(self.block.get()) };
    }
}
