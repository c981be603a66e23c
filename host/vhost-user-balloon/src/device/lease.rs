// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases: targets for a limited time.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::term::Term;

/// A new target, in balloon pages.
#[derive(Clone, Copy, Debug)]
pub struct NewTarget {
    /// The target.
    pub pages: u32,
    /// The target that must be in force.
    pub expected: Option<u64>,
    /// For how long the target is in force.
    pub lease: Option<Duration>,
    /// The target after that. By default it is the one before the lease.
    pub fallback: Option<u32>,
}

impl From<u32> for NewTarget {
    fn from(pages: u32) -> Self {
        Self {
            pages,
            expected: None,
            lease: None,
            fallback: None,
        }
    }
}

/// A lease on the target that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it ends, by [`clock`].
    pub term: Term,
    /// The target after it, in balloon pages.
    pub fallback: u32,
}

/// A lease in the state file.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct KeptLease {
    /// The target until it ends, in balloon pages.
    pub target: u32,
    /// When it ends.
    #[serde(flatten)]
    pub term: Term,
}

/// The clock of leases. It stops while the host is suspended: a client that is suspended as well cannot renew its lease.
pub fn clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}
