// SPDX-License-Identifier: GPL-2.0

//! Excludes the driver's callback for pages that come online, and other threads that take memory
//! offline.
//!
//! The kernel's functions that set and restore the callback wait for its lock for memory hotplug. A
//! thread that takes memory offline holds this lock until it has succeeded or gets a signal, which
//! may be never. The kernel calls the notifiers with the lock held. They refuse to let another
//! thread begin while the driver has its callback, and the driver sets none while another thread
//! is at work.
//!
//! A notifier that is unregistered misses the end of another thread's work. But the driver takes a
//! block offline before it sets the callback. It has the lock then: the other work has ended.

#![forbid(unsafe_code)]

use kernel::{
    error::code::ERESTARTNOINTR,
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Release, //
    }, //
};

/// No memory goes offline, and the callback is the kernel's own, not the driver's.
const IDLE: u32 = 0;

/// The driver has set its callback, or is about to.
const CALLBACK: u32 = 1;

/// Another thread takes memory offline.
const OFFLINING: u32 = 2;

static STATE: Atomic<u32> = Atomic::new(IDLE);

/// Until this is dropped no other thread takes memory offline for long.
pub(crate) struct CallbackTurn(());

impl CallbackTurn {
    /// Begins one. The caller has the right to take blocks.
    ///
    /// # Errors
    ///
    /// `ERESTARTNOINTR` if another thread takes memory offline.
    pub(crate) fn begin() -> Result<Self> {
        match STATE.cmpxchg(IDLE, CALLBACK, Full) {
            Ok(_) => Ok(Self(())),
            Err(_) => Err(ERESTARTNOINTR),
        }
    }
}

impl Drop for CallbackTurn {
    fn drop(&mut self) {
        STATE.store(IDLE, Release);
    }
}

/// Notes that another thread begins to take memory offline.
///
/// # Errors
///
/// `EBUSY`: it must not, since the driver has set its callback.
pub(crate) fn begin_offlining() -> Result {
    match STATE.cmpxchg(IDLE, OFFLINING, Full) {
        Err(CALLBACK) => Err(EBUSY),
        _ => Ok(()),
    }
}

/// Notes that no other thread takes memory offline any more, or that it was refused.
pub(crate) fn end_offlining() {
    // After a refusal the state is another one.
    let _ = STATE.cmpxchg(OFFLINING, IDLE, Full);
}
