// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the balloon and of the guest.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::counters::Counters;

/// The state of the balloon and of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// The name of the VM, if the daemon was given one.
    #[serde(default)]
    pub name: Option<String>,
    /// The process of the VMM, as the daemon sees its number. Nothing without a VMM, and if the number is not known.
    #[serde(default)]
    pub vmm: Option<i32>,
    /// The target, in bytes.
    pub target: u64,
    /// The balloon size as the guest reports it, in bytes.
    pub size: u64,
    /// The memory in the balloon by the guest's messages, in bytes. The device counts it.
    #[serde(default)]
    pub held: u64,
    /// The memory that the host has allocated for the guest, in bytes: the blocks of its memory files. Nothing without a
    /// VMM, or if the files are on a disk.
    #[serde(default)]
    pub resident: Option<u64>,
    /// The guest's memory in bytes, the balloon's included: from its statistics or, until the guest sends any, the
    /// memory that the VMM has shared.
    pub memory: Option<u64>,
    /// The memory that the VMM has shared, in bytes. It contains memory that the guest lacks, such as
    /// unplugged memory of a virtio-mem device.
    #[serde(default)]
    pub shared: Option<u64>,
    /// The largest balloon that the daemon requests, in bytes: it leaves a floor to the guest.
    #[serde(default)]
    pub limit: Option<u64>,
    /// The lease on the target, if it has one.
    #[serde(default)]
    pub lease: Option<Lease>,
    /// The target is that after a lease that has run out, and no client has set another one.
    #[serde(default)]
    pub lapsed: bool,
    /// By how many bytes the daemon may still lower the target by itself. Nothing from a daemon that never does.
    #[serde(default)]
    pub release: Option<u64>,
    /// By how many bytes the daemon has done so since a client has set the target.
    #[serde(default)]
    pub released: u64,
    /// The remaining boot grace, in seconds.
    #[serde(default)]
    pub grace: Option<u64>,
    /// The smallest piece of memory that the host can take back, in bytes.
    pub granule: u64,
    /// The names of the reasons why no memory is returned to the host. Later versions may add
    /// reasons.
    #[serde(default)]
    pub withheld: Vec<String>,
    /// The remaining time of the longest `inhibit`, in seconds.
    #[serde(default)]
    pub inhibited: Option<u64>,
    /// The same for each owner. The empty name is for clients that gave none.
    #[serde(default)]
    pub inhibitors: BTreeMap<String, u64>,
    /// The interval of statistics requests, in seconds. 0 is never.
    pub stats_interval: u32,
    /// The version of the worker's program, which may differ from the installed one. Empty from an older worker.
    #[serde(default)]
    pub version: String,
    /// The time since the worker process started, in seconds.
    pub uptime: u64,
    /// The guest.
    pub guest: Guest,
    /// The counts since the worker process started.
    pub counters: Counters,
}

/// A lease on a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The remaining time, in milliseconds.
    pub remaining: u64,
    /// The target after it, in bytes.
    pub fallback: u64,
    /// The name of the program that has taken it, if it gave one.
    #[serde(default)]
    pub owner: Option<String>,
}

/// The largest page size of a guest's kernel, in bytes. A driver rounds a target up to its pages.
const LARGEST_PAGE: u64 = 64 << 10;

impl Info {
    /// The currently requested size in bytes, without the boot grace.
    pub fn asked(&self) -> u64 {
        self.target.min(self.limit.unwrap_or(u64::MAX))
    }

    /// Whether the balloon has the requested size, rounded up to a page of the guest.
    pub fn is_reached(&self) -> bool {
        let asked = self.asked();
        (asked..asked.saturating_add(LARGEST_PAGE)).contains(&self.size)
    }
}

/// The state of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// A VMM is connected.
    pub connected: bool,
    /// A driver in the guest has negotiated features, and its queues are ready.
    pub driver: bool,
    /// The names of the negotiated features.
    pub features: Vec<String>,
    /// The time since the guest last used a queue, in seconds.
    pub answered: Option<u64>,
    /// The guest's stop reason, if it reports one.
    pub short_of_target: Option<Shortfall>,
    /// The number of open host requests.
    pub open_requests: u64,
}

/// Why a guest stops inflating before it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shortfall {
    /// The guest would have less available memory than its reserve.
    Floor,
    /// The driver cannot allocate memory.
    NoMemory,
    /// The guest ran out of memory, and the driver pauses.
    AfterOom,
    /// The guest's administrator has turned ballooning off.
    Excluded,
}

impl Shortfall {
    /// Its name on the socket.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::NoMemory => "no-memory",
            Self::AfterOom => "after-oom",
            Self::Excluded => "excluded",
        }
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Floor => "the guest's floor is reached",
            Self::NoMemory => "the guest has no free memory",
            Self::AfterOom => "the guest ran out of memory and pauses",
            Self::Excluded => "the guest is kept out of ballooning",
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_client_passes_over_what_is_new() {
        let guest = json!({
            "connected": true, "driver": true, "features": [], "answered": null,
            "short_of_target": "after-oom", "open_requests": 0, "mood": "good"
        });
        let guest: Guest = serde_json::from_value(guest).unwrap();
        assert_eq!(guest.short_of_target, Some(Shortfall::AfterOom));
    }

    #[test]
    fn a_target_is_reached_in_pages_of_the_guest() {
        let info = |target, size, limit| Info {
            target,
            size,
            limit,
            ..Info::default()
        };
        assert!(info(1_000_001_536, 1_000_013_824, None).is_reached());
        assert!(info(0, 0, None).is_reached());
        assert!(!info(1 << 30, (1 << 30) - 4096, None).is_reached());
        assert!(!info(1 << 30, (1 << 30) + 65536, None).is_reached());
        assert!(info(2 << 30, 1 << 30, Some(1 << 30)).is_reached());
    }
}
