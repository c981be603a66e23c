// SPDX-License-Identifier: GPL-2.0

//! Waiting for an event that an interrupt announces.
//!
//! The condition variables of the `kernel` crate need a lock that both sides take, which an
//! interrupt handler cannot, and the crate's completions have no timeout.
//!
//! C header: [`include/linux/completion.h`](srctree/include/linux/completion.h)

use kernel::{
    bindings,
    prelude::*,
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

/// A completion that may be completed many times, and that one thread at a time waits for.
#[pin_data]
pub(crate) struct Completion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: A completion does its own locking.
unsafe impl Send for Completion {}

// SAFETY: As above.
unsafe impl Sync for Completion {}

impl Completion {
    /// Returns an initialiser for one that is not completed.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes.
            inner <- Opaque::ffi_init(|slot| unsafe { bindings::init_completion(slot) }),
        })
    }

    /// Waits until `condition` holds. Checks it after each [`complete`](Self::complete), and every
    /// `interval` milliseconds in any case. There is no timeout: the caller makes sure that
    /// `condition` holds at some time.
    pub(crate) fn wait_until(&self, interval: Msecs, mut condition: impl FnMut() -> bool) {
        while !condition() {
            // An earlier call of `complete` counts: the condition may hold since then.
            //
            // SAFETY: The completion is initialised. A signal would end the wait early, but worker
            // threads get no signals.
            unsafe {
                bindings::wait_for_completion_interruptible_timeout(
                    self.inner.get(),
                    msecs_to_jiffies(interval),
                )
            };
        }
    }

    /// Makes the waiting thread check its condition. Callable from any context.
    pub(crate) fn complete(&self) {
        // SAFETY: The completion is initialised.
        unsafe { bindings::complete(self.inner.get()) };
    }
}
