// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases: targets for a limited time.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::term::Term;

/// A new target, in balloon pages.
#[derive(Clone, Debug)]
pub struct NewTarget {
    /// The target.
    pub pages: u32,
    /// The target that must be in force.
    pub expected: Option<u64>,
    /// For how long the target is in force.
    pub lease: Option<Duration>,
    /// The target after that. By default it is the one before the lease.
    pub fallback: Option<u32>,
    /// The name of the program that takes the lease.
    pub owner: Option<String>,
    /// By how much the device may lower the target by itself. A renewal without it leaves the present allowance.
    pub release: Option<u32>,
}

/// What the device releases by itself when the guest is short of memory, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// By how much it may still lower the target.
    pub left: u32,
    /// By how much it has, since a client has set the target.
    pub used: u32,
}

impl From<u32> for NewTarget {
    fn from(pages: u32) -> Self {
        Self {
            pages,
            expected: None,
            lease: None,
            fallback: None,
            owner: None,
            release: None,
        }
    }
}

/// A lease on the target that is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it ends, by [`clock`].
    pub term: Term,
    /// How long it lasts from each renewal on.
    pub time: Duration,
    /// This process has found it in the state file, and no client has renewed it since.
    pub found: bool,
    /// The target after it, in balloon pages.
    pub fallback: u32,
    /// The name of the program that has taken it.
    pub owner: Option<String>,
}

/// A lease in the state file. Renewals do not change the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptLease {
    /// The target until it ends, in balloon pages.
    pub target: u32,
    /// How long it lasts from each renewal on.
    pub time: Duration,
    /// When a client took it. A time ahead of the clock is from before a reboot of the host, which ends it.
    pub from: Duration,
    /// When it ends, unless a client renews it. Nothing if clients have renewed it: the process that finds it in the file
    /// does not know when, and the lease begins once more.
    pub until: Option<Duration>,
    /// The name of the program that has taken it.
    #[serde(default)]
    pub owner: Option<String>,
}

impl KeptLease {
    /// What a state file has of a lease on this target.
    pub fn new(target: u32, lease: &Lease) -> Self {
        Self {
            target,
            time: lease.time,
            from: lease.term.from,
            until: lease.found.then_some(lease.term.until),
            owner: lease.owner.clone(),
        }
    }

    /// The lease for the process that finds it at `now`, unless it is over.
    pub fn find(self, fallback: u32, now: Duration) -> Option<Lease> {
        let until = self.until.unwrap_or(now.saturating_add(self.time));
        let term = Term {
            from: self.from,
            until,
        };
        term.rest(now)?;
        Some(Lease {
            term,
            time: self.time,
            found: true,
            fallback,
            owner: self.owner,
        })
    }
}

/// The clock of leases. It stops while the host is suspended: a client that is suspended as well cannot renew its lease.
pub fn clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}
