// SPDX-License-Identifier: GPL-2.0

//! Signals to threads of the kernel.
//!
//! C header: [`include/linux/signal.h`](srctree/include/linux/signal.h)

use kernel::{
    bindings,
    prelude::*, //
};

/// What `allow_signal()` and `disallow_signal()` pass for a handler.
#[derive(Clone, Copy)]
enum Handler {
    Ignore = 1,
    Allow = 2,
}

fn set_handler(signal: u32, handler: Handler) {
    // SAFETY: A handler is a pointer, and these numbers stand for no function. The kernel's function
    // is for the thread's own signals.
    unsafe {
        let handler = core::mem::transmute::<usize, bindings::__sighandler_t>(handler as usize);

        bindings::kernel_sigaction(signal as c_int, handler);
    }
}

/// Accepts a signal from now on, in the thread that calls.
pub(super) fn allow(signal: u32) {
    set_handler(signal, Handler::Allow);
}

/// Takes [`allow`] back.
pub(super) fn disallow(signal: u32) {
    set_handler(signal, Handler::Ignore);
}
