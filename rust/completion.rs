// SPDX-License-Identifier: GPL-2.0

//! A completion whose waiter does not wait for ever.
//!
//! [`kernel::sync::Completion`] has neither a timed wait nor a way to start over.
//!
//! C header: [`include/linux/completion.h`](srctree/include/linux/completion.h)

use kernel::{
    bindings,
    prelude::*,
    sync::LockClassKey,
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

/// An event that one thread waits for, with a time limit, and another signals.
#[pin_data]
pub(crate) struct TimedCompletion {
    #[pin]
    inner: Opaque<bindings::completion>,
}

// SAFETY: `struct completion` may be used from any thread.
unsafe impl Send for TimedCompletion {}

// SAFETY: `struct completion` does its own locking.
unsafe impl Sync for TimedCompletion {}

impl TimedCompletion {
    /// Returns an initialiser for an event that has not happened yet.
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot: *mut bindings::completion| {
                // SAFETY: `slot` is valid for writes, and a `struct completion` consists of these two
                // parts; `name` and `key` are static.
                unsafe {
                    (&raw mut (*slot).done).write(0);
                    bindings::__init_swait_queue_head(
                        &raw mut (*slot).wait,
                        name.as_char_ptr(),
                        key.as_ptr(),
                    );
                }
            }),
        })
    }

    /// Says that the event has happened, to one waiter: the present one, or else the next.
    pub(crate) fn complete(&self) {
        // SAFETY: `inner` was initialised in `new`.
        unsafe { bindings::complete(self.inner.get()) };
    }

    /// Makes it so that the event has not happened. Nobody may be waiting for it.
    pub(crate) fn reset(&self) {
        // SAFETY: `inner` was initialised in `new`; this is what `reinit_completion` does.
        unsafe { (&raw mut (*self.inner.get()).done).write_volatile(0) };
    }

    /// Waits for the event for `timeout` milliseconds at most; returns whether it happened.
    pub(crate) fn wait(&self, timeout: Msecs) -> bool {
        // SAFETY: `inner` was initialised in `new`.
        unsafe {
            bindings::wait_for_completion_timeout(self.inner.get(), msecs_to_jiffies(timeout)) != 0
        }
    }
}
