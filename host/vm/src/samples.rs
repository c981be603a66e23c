// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Repeated measurements.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use statrs::statistics::{Data, Max, Min, OrderStatistics};

/// Values of repeated measurements, in one unit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a time, in seconds.
    pub fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64());
    }

    /// Adds another value.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// All of them, in the order of measurement.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    fn data(&self) -> Data<Vec<f64>> {
        Data::new(self.0.clone())
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.data().median()
    }

    /// The value that `percent` of them are below.
    pub fn percentile(&self, percent: usize) -> f64 {
        self.data().percentile(percent)
    }

    /// Their average.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// The least one.
    pub fn min(&self) -> f64 {
        self.data().min()
    }

    /// The greatest one.
    pub fn max(&self) -> f64 {
        self.data().max()
    }

    /// The median relative to that of `others`.
    pub fn ratio(&self, others: &Self) -> f64 {
        self.median() / others.median()
    }

    /// Whether the ranges of the two overlap: some of these are less than some of `others`, and some more.
    pub fn overlaps(&self, others: &Self) -> bool {
        self.min() <= others.max() && others.min() <= self.max()
    }

    /// The median, the least and the greatest one, which are seconds.
    pub fn in_seconds(&self) -> String {
        let (unit, digits, scale) = match self.median() < 0.5 {
            true => ("ms", 1, 1e3),
            false => ("s", 2, 1.0),
        };
        self.in_unit(scale, digits, unit)
    }

    /// The median, the least and the greatest one, `scale` times as large, with so many `digits` and their `unit`.
    pub fn in_unit(&self, scale: f64, digits: usize, unit: &str) -> String {
        let [median, min, max] = [self.median(), self.min(), self.max()].map(|value| value * scale);
        format!("{median:.digits$} {unit} ({min:.digits$} to {max:.digits$})")
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// The median, and the least and the greatest one.
impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, min, max] = [self.median(), self.min(), self.max()];
        write!(f, "{median:.3} ({min:.3} to {max:.3})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let samples = Samples::from_iter([3.0, 1.0, 2.0]);
        assert!((samples.median() - 2.0).abs() < f64::EPSILON);
        assert!((samples.percentile(99) - 3.0).abs() < f64::EPSILON);
        assert_eq!(samples.to_string(), "2.000 (1.000 to 3.000)");
        assert_eq!(samples.in_seconds(), "2.00 s (1.00 to 3.00)");
        let samples = Samples::from_iter([0.01, 0.02]);
        assert_eq!(samples.in_seconds(), "15.0 ms (10.0 to 20.0)");
    }

    #[test]
    fn ranges_overlap_where_they_touch() {
        let samples = |values: [f64; 2]| Samples::from_iter(values);
        assert!(samples([1.0, 3.0]).overlaps(&samples([2.0, 4.0])));
        assert!(samples([2.0, 4.0]).overlaps(&samples([1.0, 2.0])));
        assert!(samples([1.0, 4.0]).overlaps(&samples([2.0, 3.0])));
        assert!(!samples([1.0, 2.0]).overlaps(&samples([3.0, 4.0])));
        assert!(!samples([3.0, 4.0]).overlaps(&samples([1.0, 2.0])));
    }
}
