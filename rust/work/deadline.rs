// SPDX-License-Identifier: GPL-2.0

//! A time limit for what a signal can end.
//!
//! C headers: [`include/linux/timer.h`](srctree/include/linux/timer.h),
//! [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h)

use crate::rust::work::signal::{
    self,
    Signal, //
};

use kernel::{
    bindings,
    container_of,
    prelude::*,
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// A timer that sends the thread a signal.
///
/// # Invariants
///
/// `timer` is initialised, and `thread` is the thread that this belongs to, for as long as the timer
/// runs.
#[pin_data]
pub(in crate::rust) struct Deadline {
    #[pin]
    timer: Opaque<bindings::timer_list>,
    thread: *mut bindings::task_struct,
    _this_thread: NotThreadSafe,
}

impl Deadline {
    /// Makes one for the thread that calls.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(in crate::rust) fn new() -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                timer <- Opaque::ffi_init(|slot| {
                    // SAFETY: `slot` is valid for writes, and stays where it is.
                    unsafe {
                        bindings::timer_init_key(
                            slot,
                            Some(Self::expire),
                            0,
                            c"balloon_rs_deadline".as_char_ptr(),
                            kernel::static_lock_class!().as_ptr(),
                        )
                    }
                }),
                // SAFETY: The function has no preconditions.
                thread: unsafe { bindings::get_current() },
                _this_thread: NotThreadSafe,
            }),
            GFP_KERNEL,
        )
    }

    /// Calls `f`, with a signal pending from `ms` milliseconds on. Afterwards no signal is pending.
    pub(in crate::rust) fn limit<T>(&self, ms: Msecs, f: impl FnOnce() -> T) -> T {
        signal::allow(Signal::Interrupt);
        // SAFETY: The timer is initialised, and is stopped before the thread continues.
        unsafe {
            bindings::mod_timer(
                self.timer.get(),
                bindings::jiffies.wrapping_add(msecs_to_jiffies(ms)),
            )
        };
        let result = f();

        // SAFETY: As above.
        unsafe { bindings::timer_delete_sync(self.timer.get()) };
        signal::disallow(Signal::Interrupt);
        // SAFETY: It is this thread.
        unsafe { bindings::flush_signals(self.thread) };
        result
    }

    /// # Safety
    ///
    /// `timer` must be that of a `Deadline` whose thread waits for it.
    unsafe extern "C" fn expire(timer: *mut bindings::timer_list) {
        // SAFETY: By the requirements of this function.
        unsafe {
            let this = container_of!(Opaque::cast_from(timer), Self, timer);

            bindings::send_sig(bindings::SIGINT as c_int, (*this).thread, 1);
        }
    }
}
