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
    /// The number of the sample. Each one has a higher number than the one before it.
    pub sequence: u64,
    /// The statistics that the guest has sent. Clients leave out those that only a newer daemon knows.
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

/// A statistic (specification, clause 5.5.6.4, and linux/virtio_balloon.h for those that are newer), in the
/// order of the tags and with the names that the header gives them.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, VariantArray,
)]
#[serde(rename_all = "kebab-case")]
pub enum Stat {
    /// What was read from swap, in bytes.
    SwapIn,
    /// What was written to swap, in bytes.
    SwapOut,
    /// How many page faults had to wait for a device.
    MajorFaults,
    /// How many page faults there were that had not to wait.
    MinorFaults,
    /// What is not in use for anything, in bytes.
    FreeMemory,
    /// What there is, in bytes.
    TotalMemory,
    /// What programs can have without swapping, in bytes.
    AvailableMemory,
    /// What is in use for caches of files, in bytes.
    DiskCaches,
    /// How many huge pages were allocated.
    HugetlbAllocations,
    /// How many allocations of huge pages failed.
    HugetlbFailures,
    /// How many times a program was killed for its memory.
    OomKills,
    /// How many allocations had to wait for memory to be reclaimed.
    AllocStalls,
    /// What was looked at in the background to reclaim it, in bytes.
    AsyncScans,
    /// What was looked at by those who need memory, in bytes.
    DirectScans,
    /// What was reclaimed in the background, in bytes.
    AsyncReclaims,
    /// What was reclaimed by those who need memory, in bytes.
    DirectReclaims,
}

/// What a statistic is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// In bytes.
    Bytes,
    /// How many times something happened.
    Times,
}

impl Stat {
    /// All of them. Each one is at the place of its tag.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// The statistic of a tag on the wire, if there is one.
    pub fn from_tag(tag: u16) -> Option<Self> {
        Self::ALL.get(usize::from(tag)).copied()
    }

    /// What it is counted in.
    pub const fn unit(self) -> Unit {
        self.kind().0
    }

    /// Whether it only grows, until the guest starts again.
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
