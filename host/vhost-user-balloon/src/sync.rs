// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a panic: a thread that panics leaves nothing behind that is worse than what a guest can
/// bring about.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
