// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits for the results.

use std::fmt;

use vm::{Samples, Zeroing};

use crate::contestant::{By, Contestant};
use crate::record::Record;

/// How much more of the host's memory than before a guest may use on the way, in MiB.
const MOST_MORE: f64 = 32.0;

/// A value and its upper limit.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    what: String,
    value: f64,
    limit: f64,
}

impl Claim {
    /// A claim that `value`, which `what` describes, is `limit` at most.
    pub(crate) fn new(what: impl Into<String>, value: f64, limit: f64) -> Self {
        Self {
            what: what.into(),
            value,
            limit,
        }
    }

    /// A claim about the ratio of two contestants' median times, if both have results.
    pub(crate) fn ratio(
        records: &[Record],
        name: &str,
        of: Contestant,
        to: Contestant,
        limit: f64,
    ) -> Option<Self> {
        let ratio = times(records, name, of)?.ratio(times(records, name, to)?);
        let what = format!("{name}: time of {of} / time of {to}");
        Some(Self::new(what, ratio, limit))
    }

    /// A claim about the ratio of a contestant's median time to that of a variant, if both have
    /// results.
    pub(crate) fn ratio_to_detail(
        records: &[Record],
        name: &str,
        of: Contestant,
        detail: &str,
        limit: f64,
    ) -> Option<Self> {
        let other = variant(records, name, of, detail)?;
        let ratio = times(records, name, of)?.ratio(&other.seconds);
        let what = format!("{name}: time of {of} / the same, {detail}");
        Some(Self::new(what, ratio, limit))
    }

    /// The claims that guests with this driver use at most [`MOST_MORE`] of the host's memory meanwhile, on both
    /// devices and in all variants where that was measured.
    pub(crate) fn peaks(records: &[Record], names: &[&str]) -> impl Iterator<Item = Self> {
        let is_one = move |record: &&Record| {
            record.driver == By::Rs && names.contains(&record.name.as_str())
        };
        records.iter().filter(is_one).filter_map(|record| {
            let peak = record.peak_mib? as f64;
            let variant = record.detail.iter().map(|detail| format!(", {detail}"));
            let what = format!(
                "{}: MiB more of the host's memory on the way with {}{}",
                record.name,
                record.contestant(),
                variant.collect::<String>()
            );
            Some(Self::new(what, peak, MOST_MORE))
        })
    }

    /// A claim about the ratio of the memory that two contestants copy, if both have results.
    pub(crate) fn copied(
        records: &[Record],
        name: &str,
        of: Contestant,
        to: Contestant,
        limit: f64,
    ) -> Option<Self> {
        let copied = |by| Some(find(records, name, by)?.transferred_mib? as f64);
        let what = format!("{name}: memory copied with {of} / with {to}");
        Some(Self::new(what, copied(of)? / copied(to)?, limit))
    }

    /// The same claim about a kernel with this setting.
    pub(crate) fn with(mut self, zeroing: Zeroing) -> Self {
        if zeroing == Zeroing::On {
            self.what += ", zeroing";
        }
        self
    }

    /// Whether the value is within the limit.
    pub fn holds(&self) -> bool {
        self.value <= self.limit
    }
}

/// A contestant's times.
pub(crate) fn times<'a>(records: &'a [Record], name: &str, of: Contestant) -> Option<&'a Samples> {
    Some(&find(records, name, of)?.seconds)
}

/// A contestant's results without a variant, with the first setting of the benchmark.
pub fn find<'a>(records: &'a [Record], name: &str, of: Contestant) -> Option<&'a Record> {
    records
        .iter()
        .find(|record| record.name == name && record.contestant() == of && record.detail.is_none())
}

/// A contestant's results of a variant, with the first setting of the benchmark.
pub(crate) fn variant<'a>(
    records: &'a [Record],
    name: &str,
    of: Contestant,
    detail: &str,
) -> Option<&'a Record> {
    records.iter().find(|record| {
        record.name == name && record.contestant() == of && record.detail.as_deref() == Some(detail)
    })
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.holds() {
            true => "limit",
            false => "FAILED, the limit is",
        };
        // Two significant digits.
        let digits = if self.value < 0.001 { 6 } else { 4 };
        write!(
            f,
            "{}: {:.digits$} ({verdict} {})",
            self.what,
            self.value,
            (self.limit * 1e4).round() / 1e4
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_growth_with_this_driver_is_claimed() {
        let record = |driver: &str, detail: Option<&str>, peak: Option<u64>| -> Record {
            serde_json::from_value(serde_json::json!({
                "name": "reclaim", "driver": driver, "device": "vhost-user", "detail": detail,
                "guest_mib": 8192, "amount_mib": 7168, "seconds": [1.0], "peak_mib": peak,
            }))
            .unwrap()
        };
        let records = [
            record("rs", None, Some(6)),
            record("rs", Some("pages only"), Some(33)),
            record("rs", Some("traced"), None),
            record("c", None, Some(99)),
        ];
        let claims: Vec<_> = Claim::peaks(&records, &["reclaim"])
            .map(|claim| claim.to_string())
            .collect();
        let what = "reclaim: MiB more of the host's memory on the way with this driver, vhost-user";
        assert_eq!(
            claims,
            [
                format!("{what}: 6.0000 (limit 32)"),
                format!("{what}, pages only: 33.0000 (FAILED, the limit is 32)"),
            ]
        );
        assert_eq!(Claim::peaks(&records, &["inflate-idle"]).count(), 0);
    }

    #[test]
    fn a_failed_claim_says_so() {
        let claim = |value| Claim::new("time", value, 1.0 / 17.0).to_string();
        assert_eq!(claim(0.0875), "time: 0.0875 (FAILED, the limit is 0.0588)");
        assert_eq!(claim(0.05), "time: 0.0500 (limit 0.0588)");
        assert_eq!(claim(0.000_048), "time: 0.000048 (limit 0.0588)");
    }
}
