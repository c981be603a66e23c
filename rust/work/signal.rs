// SPDX-License-Identifier: GPL-2.0

//! Signals to threads of the kernel.
//!
//! C header: [`include/linux/signal.h`](srctree/include/linux/signal.h)

use kernel::{
    bindings,
    current,
    prelude::*, //
};

/// A signal that threads of this driver accept.
#[derive(Clone, Copy)]
pub(super) enum Signal {
    /// The thread's operation takes too long.
    Interrupt = bindings::SIGINT as isize,
    /// The thread must end.
    Kill = bindings::SIGKILL as isize,
}

/// The handlers of `allow_signal()` and `disallow_signal()`.
#[derive(Clone, Copy)]
enum Handler {
    Ignore = 1,
    Allow = 2,
}

/// Returns whether the calling thread is one of the kernel. Such a thread has no signals, unless it
/// [accepts](allow) them.
pub(super) fn is_kernel_thread() -> bool {
    // SAFETY: The thread changes these flags itself.
    let flags = unsafe { (*current!().as_ptr()).flags };

    flags & bindings::PF_KTHREAD != 0
}

fn set_handler(signal: Signal, handler: Handler) {
    // SAFETY: A handler is a pointer, and these numbers stand for no function. The kernel's
    // function sets it for the thread itself, which has a handler for each of these signals.
    unsafe {
        let handler = core::mem::transmute::<usize, bindings::__sighandler_t>(handler as usize);

        bindings::kernel_sigaction(signal as c_int, handler);
    }
}

/// Accepts a signal from now on, in the calling thread.
pub(super) fn allow(signal: Signal) {
    set_handler(signal, Handler::Allow);
}

/// Takes [`allow`] back.
pub(super) fn disallow(signal: Signal) {
    set_handler(signal, Handler::Ignore);
}
