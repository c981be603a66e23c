// SPDX-License-Identifier: GPL-2.0

//! Waiting for something that an interrupt announces.
//!
//! The condition variables of the `kernel` crate need a lock that both sides take, which an
//! interrupt handler cannot.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

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

/// A queue of those who wait.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: A wait queue does its own locking.
unsafe impl Send for WaitQueue {}

// SAFETY: As above.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Returns an initialiser for an empty queue; see [`new_wait_queue!`].
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes, and the name and the key are static.
            head <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_waitqueue_head(slot, name.as_char_ptr(), key.as_ptr())
            }),
        })
    }

    /// Waits until `condition`, which must not sleep, holds. It is looked at after each
    /// [`wake`](Self::wake), and in any case after `interval` milliseconds.
    pub(crate) fn wait_until(&self, interval: Msecs, mut condition: impl FnMut() -> bool) {
        let entry = Opaque::<bindings::wait_queue_entry>::uninit();

        // SAFETY: `entry` is valid for writes. It is taken off the queue below, before it ends.
        unsafe { bindings::init_wait_entry(entry.get(), 0) };

        loop {
            // Nothing is missed that happens after this.
            //
            // SAFETY: Both are initialised. The state is one that a thread may sleep in; for as
            // long as there are no signals, which a worker thread does not get.
            unsafe {
                bindings::prepare_to_wait_event(
                    self.head.get(),
                    entry.get(),
                    bindings::TASK_INTERRUPTIBLE as c_int,
                )
            };

            if condition() {
                break;
            }

            // SAFETY: Switches to another thread.
            unsafe { bindings::schedule_timeout(msecs_to_jiffies(interval) as c_long) };
        }

        // SAFETY: Both are initialised.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
    }

    /// Wakes those who wait. Callable from any context.
    pub(crate) fn wake(&self) {
        // SAFETY: The head is initialised.
        unsafe {
            bindings::__wake_up(
                self.head.get(),
                bindings::TASK_NORMAL,
                0,
                core::ptr::null_mut(),
            )
        };
    }
}

/// Creates a [`WaitQueue`] initialiser with a lock class of its own.
macro_rules! new_wait_queue {
    ($name:literal $(,)?) => {
        $crate::rust::work::wait::WaitQueue::new(
            ::kernel::optional_name!($name),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_wait_queue;
