// SPDX-License-Identifier: GPL-2.0

//! Failed attempts to take memory blocks: when to give up.

#![forbid(unsafe_code)]

use kernel::{
    error::code::ERESTARTNOINTR,
    prelude::*, //
};

/// How many attempts in a row may fail before the task gives up.
const MAX_FAILURES: usize = 3;

/// The failed attempts since a block was taken.
#[derive(Default)]
pub(super) struct Attempts {
    failures: usize,
}

impl Attempts {
    /// Notes that a block was taken.
    pub(super) fn succeed(&mut self) {
        self.failures = 0;
    }

    /// Notes that an attempt has failed. Returns whether to try another block.
    pub(super) fn fail(&mut self, error: Error) -> bool {
        match error {
            // The next one may succeed: this was a block of CMA, one that another thread has taken,
            // or one that is not needed any more.
            EBUSY | ECANCELED => true,
            // Another thread has had the kernel's lock for hotplug for too long.
            ERESTARTNOINTR => false,
            _ => {
                self.failures += 1;
                self.failures < MAX_FAILURES
            }
        }
    }
}
