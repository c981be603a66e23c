// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the balloon and of the guest.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::counters::Counters;

/// The state of the balloon and of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// How much the guest is asked to give away, in bytes.
    pub target: u64,
    /// How much the guest has given away, in bytes, as it says itself.
    pub size: u64,
    /// How much memory the guest has, in bytes, in the balloon or not. It is what the guest says in its statistics,
    /// or what the VMM has shared as long as there are none.
    pub memory: Option<u64>,
    /// How much memory the VMM has shared, in bytes. It has memory that the guest has not, such as what a
    /// virtio-mem device has not plugged.
    #[serde(default)]
    pub shared: Option<u64>,
    /// The largest balloon that the daemon asks for, in bytes: it leaves the guest a floor.
    #[serde(default)]
    pub limit: Option<u64>,
    /// For how long a guest that boots is still left alone, in seconds.
    #[serde(default)]
    pub grace: Option<u64>,
    /// The smallest piece of memory that the host gets back, in bytes.
    pub granule: u64,
    /// Why memory is not given back to the host, by the name of the reason. More may come in later versions.
    #[serde(default)]
    pub withheld: Vec<String>,
    /// For how long a client still has no memory given back to the host, in seconds.
    #[serde(default)]
    pub inhibited: Option<u64>,
    /// The same for each owner. The empty name is for clients that gave none.
    #[serde(default)]
    pub inhibitors: BTreeMap<String, u64>,
    /// How often the guest is asked for statistics, in seconds. 0 is never.
    pub stats_interval: u32,
    /// For how long the daemon has been running, in seconds.
    pub uptime: u64,
    /// The other side.
    pub guest: Guest,
    /// What has been counted since the daemon was started.
    pub counters: Counters,
}

/// The size of the largest page that a guest's kernel has, in bytes. A driver rounds a target up to its pages.
const LARGEST_PAGE: u64 = 64 << 10;

impl Info {
    /// How much the guest is asked for now, in bytes, without regard to a boot.
    pub fn asked(&self) -> u64 {
        self.target.min(self.limit.unwrap_or(u64::MAX))
    }

    /// Whether the guest has given away what it is asked for, rounded up to a page of its own.
    pub fn is_reached(&self) -> bool {
        let asked = self.asked();
        (asked..asked.saturating_add(LARGEST_PAGE)).contains(&self.size)
    }
}

/// What is known about the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// A VMM is connected.
    pub connected: bool,
    /// A driver in the guest has negotiated features, and its queues are ready.
    pub driver: bool,
    /// The names of the features that were negotiated.
    pub features: Vec<String>,
    /// How long ago the guest did something for the last time, in seconds.
    pub answered: Option<u64>,
    /// Why the guest stays below the target, when it tells.
    pub short_of_target: Option<Shortfall>,
    /// How many requests the guest is to answer.
    pub open_requests: u64,
}

/// Why a guest stops inflating before it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shortfall {
    /// It would have less memory than the driver wants to leave it.
    Floor,
    /// It finds no memory that it could give away.
    NoMemory,
    /// It ran out of memory, and leaves the balloon alone for a while.
    AfterOom,
    /// Its administrator keeps it out of ballooning.
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
