// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks, and the order in which a thread takes them.
//!
//! Each lock has a [`Level`]. A thread takes a lock only while all locks that it holds have lower levels, so it holds one
//! of each level at most. Tests and builds with debug assertions panic at the first lock that breaks this rule.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::{self, Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// The place of a lock in the order.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// A thread holds it while it waits for a disk, or looks at other processes. The guest and the front end wait for
    /// the other locks, and must not wait for that.
    Slow,
    /// The library's lock of a queue: see [`order`].
    Queue,
    /// The data of the thread that serves the queues, which holds it for a batch of messages.
    Work,
    /// A thread holds it for a moment, and takes no other lock meanwhile.
    Short,
}

thread_local! {
    /// A bit for each level of which this thread holds a lock.
    static HELD: Cell<u8> = const { Cell::new(0) };
}

/// Whether the order is checked.
const IS_CHECKED: bool = cfg!(any(test, debug_assertions));

/// A lock of this level is held as long as this lives.
#[derive(Debug)]
pub(crate) struct Held(Level);

/// Takes note that this thread takes a lock of this level, which is none of a [`Mutex`].
pub(crate) fn order(level: Level) -> Held {
    if IS_CHECKED {
        let (held, bit) = (HELD.get(), 1 << level as u8);
        assert!(
            held < bit,
            "a lock is taken that is {level:?}, with another one of this or a higher level"
        );
        HELD.set(held | bit);
    }
    Held(level)
}

impl Drop for Held {
    fn drop(&mut self) {
        if IS_CHECKED {
            HELD.set(HELD.get() & !(1 << self.0 as u8));
        }
    }
}

/// A mutex with a level.
#[derive(Debug)]
pub struct Mutex<T> {
    level: Level,
    mutex: sync::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A mutex of this level.
    pub const fn new(level: Level, value: T) -> Self {
        Self {
            level,
            mutex: sync::Mutex::new(value),
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    /// A mutex that is held for a moment, as most are.
    fn default() -> Self {
        Self::new(Level::Short, T::default())
    }
}

/// The right to use what a mutex protects.
#[derive(Debug)]
pub struct Guard<'a, T> {
    guard: MutexGuard<'a, T>,
    held: Held,
}

/// Locks `mutex`, also after a panic: the state after a panic is no worse than states that a guest can cause.
pub fn lock<T>(mutex: &Mutex<T>) -> Guard<'_, T> {
    let held = order(mutex.level);
    Guard {
        guard: mutex.mutex.lock().unwrap_or_else(PoisonError::into_inner),
        held,
    }
}

impl<T> Guard<'_, T> {
    /// Waits as long as `condition` holds, and for `timeout` at most. Others can lock the mutex meanwhile.
    pub(crate) fn wait_while(
        self,
        condvar: &Condvar,
        timeout: Duration,
        condition: impl FnMut(&mut T) -> bool,
    ) -> Self {
        let Self { guard, held } = self;
        let waited = condvar.wait_timeout_while(guard, timeout, condition);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Self { guard, held }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(level: Level) -> Mutex<()> {
        Mutex::new(level, ())
    }

    #[test]
    fn locks_are_taken_in_their_order() {
        let (slow, work, short) = (at(Level::Slow), at(Level::Work), at(Level::Short));
        for _ in 0..2 {
            let _slow = lock(&slow);
            let queue = order(Level::Queue);
            let _work = lock(&work);
            drop(lock(&short));
            // The order in which they are released does not matter.
            drop(queue);
            drop(lock(&short));
        }
    }

    #[test]
    #[should_panic = "a lock is taken that is Work"]
    fn a_lock_of_a_lower_level_is_noticed() {
        let (work, short) = (at(Level::Work), at(Level::Short));
        let _short = lock(&short);
        lock(&work);
    }

    #[test]
    #[should_panic = "a lock is taken that is Short"]
    fn a_second_lock_of_a_level_is_noticed() {
        let (one, other) = (at(Level::Short), at(Level::Short));
        let _one = lock(&one);
        lock(&other);
    }

    #[test]
    #[should_panic = "a lock is taken that is Slow"]
    fn a_thread_that_serves_a_queue_does_not_wait_for_a_disk() {
        let slow = at(Level::Slow);
        let _queue = order(Level::Queue);
        lock(&slow);
    }
}
