// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the manager, for its clients.

use balloon_policy::{Account, Action, Millis, Pages};
use serde::{Deserialize, Serialize};

/// An action that was decided.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Past {
    /// In milliseconds since the manager was started.
    pub(crate) at: Millis,
    pub(crate) action: Action,
}

/// The counters for the metrics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) decisions: u64,
    pub(crate) raises: u64,
    pub(crate) cuts: u64,
    pub(crate) refused: u64,
}

/// A VM for clients.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct VmStatus {
    pub(crate) name: String,
    pub(crate) account: Option<Account>,
    /// In one or more words.
    pub(crate) state: String,
    /// The cause of the last action.
    pub(crate) cause: Option<String>,
    pub(crate) resident: Option<Pages>,
    pub(crate) last: Option<Past>,
    /// How many targets have given memory to the VM.
    pub(crate) raises: u64,
    /// How many have taken memory from it.
    pub(crate) cuts: u64,
}

/// The host for clients.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Status {
    pub(crate) now: Millis,
    pub(crate) observe: bool,
    pub(crate) pool: Pages,
    pub(crate) reserve: Pages,
    pub(crate) charged: Pages,
    pub(crate) reserved: Pages,
    /// In observe mode: how much less the host would give to the VMs.
    pub(crate) saved: Pages,
    pub(crate) vms: Vec<VmStatus>,
}

/// A reservation for clients.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Reserved {
    pub(crate) id: u32,
    /// The memory is free.
    pub(crate) admitted: bool,
}
