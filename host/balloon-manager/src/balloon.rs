// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon, as a device of either kind reports it.

use std::time::Duration;

use balloon_policy::Stopped;

/// How long a device may take for an answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(2);

/// The state of a balloon. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Balloon {
    /// The VM's memory, in the balloon or not, or nothing if it is not known.
    pub(crate) memory: Option<u64>,
    /// The part of it that the guest says it can never use.
    pub(crate) unusable: u64,
    /// There is a VM.
    pub(crate) connected: bool,
    /// The process of the VMM, if the device reports it.
    pub(crate) vmm: Option<i32>,
    /// The largest target.
    pub(crate) largest: u64,
    pub(crate) target: u64,
    /// The target has a lease of this or an earlier manager.
    pub(crate) leased: bool,
    /// The target has a lease of another program.
    pub(crate) claimed: bool,
    /// The guest sends statistics without a request when it is short of memory.
    pub(crate) notifies: bool,
    /// The target is that after a lease that has run out.
    pub(crate) lapsed: bool,
    /// By how much the device may still lower the target by itself, if it ever does.
    pub(crate) release: Option<u64>,
    /// By how much it has since the target was set.
    pub(crate) released: u64,
    /// What of the VM's memory is in the balloon, and with the host.
    pub(crate) size: u64,
    /// What the host has given to the VM, if the device reports it.
    pub(crate) resident: Option<u64>,
    /// The discard granularity.
    pub(crate) granule: u64,
    /// The guest's driver works.
    pub(crate) driver: bool,
    /// The target must stay as it is.
    pub(crate) frozen: bool,
    /// Why the balloon is smaller than its target.
    pub(crate) stopped: Option<Stopped>,
}

/// The lease with which a target is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) time: Duration,
    /// The target after it, in bytes.
    pub(crate) fallback: u64,
}

/// What the manager does with its lease on a VM's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tenure {
    /// It neither renews nor ends the lease.
    Unknown,
    /// It renews the lease.
    Renewed(Terms),
    /// It ends the lease, and the target stays: the manager leaves the VM alone.
    Ended,
}

impl Tenure {
    /// The lease of a target that is set now.
    pub(crate) const fn terms(&self) -> Option<Terms> {
        match self {
            Self::Renewed(terms) => Some(*terms),
            Self::Unknown | Self::Ended => None,
        }
    }
}

/// A target that replaces another one. Both are in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) before: u64,
    pub(crate) target: u64,
    pub(crate) terms: Option<Terms>,
    /// By how much the device may lower the target by itself. Nothing leaves the present allowance.
    pub(crate) release: Option<u64>,
}

/// What has become of a target that was sent.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is set.
    Set,
    /// The device refuses it, for this reason.
    Refused(String),
    /// This other target, in bytes, is in force, and stays.
    Conflict(u64),
}

impl Balloon {
    /// Whether another state has the same values, except resident memory, which changes all the time.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let resident = self.resident;
        *self == Self { resident, ..*other }
    }

    /// The guest reports less memory than it has in the balloon.
    pub(crate) fn is_impossible(&self) -> bool {
        let total = self.memory.map(|all| all.saturating_sub(self.unusable));
        total.is_some_and(|total| self.size > total)
    }
}
