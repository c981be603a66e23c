// SPDX-License-Identifier: GPL-2.0

//! A time limit for functions that a signal can interrupt.
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
    current,
    prelude::*,
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

#[cfg(not(CONFIG_DEBUG_OBJECTS_TIMERS))]
use bindings::timer_init_key as timer_init;
#[cfg(CONFIG_DEBUG_OBJECTS_TIMERS)]
use bindings::timer_init_key_on_stack as timer_init;

/// A timer on a thread's stack, and the thread to which it sends a signal.
struct Deadline {
    timer: bindings::timer_list,
    thread: *mut bindings::task_struct,
}

/// Calls `f`, with a signal pending from `ms` milliseconds on. Afterwards no signal is pending.
/// Allocates nothing.
///
/// Only for threads of the kernel: a process has handlers and pending signals of its own. In a
/// process there is no limit.
pub(in crate::rust) fn limit<T>(ms: Msecs, f: impl FnOnce() -> T) -> T {
    if !signal::is_kernel_thread() {
        return f();
    }
    let deadline = Opaque::new(Deadline {
        timer: pin_init::zeroed(),
        thread: current!().as_ptr(),
    });
    let deadline = deadline.get();

    signal::allow(Signal::Interrupt);
    // SAFETY: `deadline` stays where it is, and its timer is deleted below before it ends. The name
    // and the key are static.
    unsafe {
        timer_init(
            &raw mut (*deadline).timer,
            Some(expire),
            0,
            c"balloon_rs_deadline".as_char_ptr(),
            kernel::static_lock_class!().as_ptr(),
        );
        bindings::mod_timer(
            &raw mut (*deadline).timer,
            bindings::jiffies.wrapping_add(msecs_to_jiffies(ms)),
        );
    }
    let result = f();

    // SAFETY: The timer is initialised. The thread is this one, and accepts no other signals.
    unsafe {
        bindings::timer_delete_sync(&raw mut (*deadline).timer);
        #[cfg(CONFIG_DEBUG_OBJECTS_TIMERS)]
        bindings::timer_destroy_on_stack(&raw mut (*deadline).timer);
        bindings::flush_signals((*deadline).thread);
    }
    signal::disallow(Signal::Interrupt);
    result
}

/// # Safety
///
/// `timer` must be that of a `Deadline` whose thread waits for it.
unsafe extern "C" fn expire(timer: *mut bindings::timer_list) {
    // SAFETY: By the requirements of this function.
    unsafe {
        let deadline = container_of!(timer, Deadline, timer);

        bindings::send_sig(bindings::SIGINT as c_int, (*deadline).thread, 1);
    }
}
