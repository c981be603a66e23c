// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory statistics.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::IntoDeserializer;
use serde::de::value::{Error, StringDeserializer};
use serde::{Deserialize, Deserializer, Serialize};
use strum::VariantArray;

/// A sample of the guest's memory statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// How old the sample is, in seconds.
    pub age: u64,
    /// How long ago the daemon requested it, in milliseconds. The guest has taken it since.
    #[serde(default)]
    pub requested: u64,
    /// The number of the sample, which increases with each sample.
    pub sequence: u64,
    /// The statistics that the guest has sent. Clients ignore those that only a newer daemon knows.
    #[serde(deserialize_with = "known")]
    pub values: BTreeMap<Stat, u64>,
}

/// Reads the statistics that have a [`Stat`].
fn known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<Stat, u64>, D::Error> {
    let all = BTreeMap::<String, u64>::deserialize(deserializer)?;
    let known = |(name, value): (String, u64)| {
        let name: StringDeserializer<Error> = name.into_deserializer();
        Some((Stat::deserialize(name).ok()?, value))
    };
    Ok(all.into_iter().filter_map(known).collect())
}

/// A statistic (specification, clause 5.5.6.4, and linux/virtio_balloon.h for newer ones), in the order of
/// the tags and with the header's names.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, VariantArray,
)]
#[serde(rename_all = "kebab-case")]
pub enum Stat {
    /// Memory read from swap, in bytes.
    SwapIn,
    /// Memory written to swap, in bytes.
    SwapOut,
    /// Page faults that waited for a device.
    MajorFaults,
    /// Page faults that did not wait.
    MinorFaults,
    /// Free memory, in bytes.
    FreeMemory,
    /// All memory, in bytes.
    TotalMemory,
    /// Memory that is available without swapping, in bytes.
    AvailableMemory,
    /// Memory in use for caches of files, in bytes.
    DiskCaches,
    /// Allocated huge pages.
    HugetlbAllocations,
    /// Failed allocations of huge pages.
    HugetlbFailures,
    /// OOM kills.
    OomKills,
    /// Allocations that waited for reclaim.
    AllocStalls,
    /// Memory scanned for reclaim in the background, in bytes.
    AsyncScans,
    /// Memory scanned by direct reclaim, in bytes.
    DirectScans,
    /// Memory reclaimed in the background, in bytes.
    AsyncReclaims,
    /// Memory reclaimed by direct reclaim, in bytes.
    DirectReclaims,
}

/// The unit of a statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// In bytes.
    Bytes,
    /// A count of events.
    Times,
}

impl Stat {
    /// All of them. The index of each is its tag.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// The statistic of a tag on the wire, if there is one.
    pub fn from_tag(tag: u16) -> Option<Self> {
        Self::ALL.get(usize::from(tag)).copied()
    }

    /// Its unit.
    pub const fn unit(self) -> Unit {
        self.kind().0
    }

    /// Whether it only grows, until the guest reboots.
    pub const fn is_counter(self) -> bool {
        self.kind().1
    }

    const fn kind(self) -> (Unit, bool) {
        match self {
            Self::FreeMemory | Self::TotalMemory | Self::AvailableMemory | Self::DiskCaches => {
                (Unit::Bytes, false)
            }
            Self::SwapIn
            | Self::SwapOut
            | Self::AsyncScans
            | Self::DirectScans
            | Self::AsyncReclaims
            | Self::DirectReclaims => (Unit::Bytes, true),
            Self::MajorFaults
            | Self::MinorFaults
            | Self::HugetlbAllocations
            | Self::HugetlbFailures
            | Self::OomKills
            | Self::AllocStalls => (Unit::Times, true),
        }
    }
}

impl fmt::Display for Stat {
    /// Writes its name on the socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn statistics_have_their_tags_and_names() {
        for (tag, name) in [
            (0, "swap-in"),
            (5, "total-memory"),
            (9, "hugetlb-failures"),
            (10, "oom-kills"),
            (15, "direct-reclaims"),
        ] {
            let stat = Stat::from_tag(tag).unwrap();
            assert_eq!(stat.to_string(), name);
            assert_eq!(serde_json::to_value(stat).unwrap(), Value::from(name));
        }
        assert_eq!(Stat::from_tag(16), None);
    }

    #[test]
    fn a_client_leaves_out_statistics_that_are_new() {
        let sample = r#"{ "age": 1, "sequence": 2, "values": { "moods": 3, "oom-kills": 4 } }"#;
        let sample: Stats = serde_json::from_str(sample).unwrap();
        assert_eq!(sample.values, BTreeMap::from([(Stat::OomKills, 4)]));
    }
}
