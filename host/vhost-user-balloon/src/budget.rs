// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The time limit of a turn of the thread that serves the queues.

use std::time::{Duration, Instant};

/// For how long a queue is served before the other queues, and threads that wait for a lock, get their turn. In tests
/// it is long, since counts must not depend on the load of the machine.
pub const BUDGET: Duration = Duration::from_millis(if cfg!(test) { 10_000 } else { 20 });

/// The time limit of a queue's turn.
#[derive(Clone, Copy, Debug)]
pub struct Budget(Option<Instant>);

impl Budget {
    /// Unlimited.
    pub const UNLIMITED: Self = Self(None);

    /// The limit of one turn.
    pub fn turn() -> Self {
        Self(Some(Instant::now() + BUDGET))
    }

    /// One that is used up.
    #[cfg(test)]
    pub(crate) fn spent() -> Self {
        Self(Some(Instant::now()))
    }

    /// Whether it is used up.
    pub fn is_over(self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }
}
