// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver is faster than the C driver.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Driver, Size};

use crate::{ALL_DEVICES, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "faster_than_c",
    proves: "7 of 8 GiB are inflated and deflated in about half of the C driver's time",
    kernels: TEST_KERNEL,
    drivers: RUST_DRIVER,
    devices: ALL_DEVICES,
    run: faster_than_c,
}];

const RUNS: usize = 3;

/// The most that the medians may be, of the C driver's.
const INFLATE_LIMIT: f64 = 0.55;
const DEFLATE_LIMIT: f64 = 0.5;

/// How long something took, each time, in seconds.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64());
    }

    /// The one in the middle.
    pub(crate) fn median(&self) -> f64 {
        median(&self.0)
    }

    /// The median as a part of that of `others`.
    pub(crate) fn ratio(&self, others: &Self) -> f64 {
        self.median() / others.median()
    }
}

/// The median, and the shortest and the longest time.
impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = || self.0.iter().copied();
        let median = self.median();
        let (min, max) = (
            times().fold(median, f64::min),
            times().fold(median, f64::max),
        );
        let (unit, digits, scale) = match median < 0.5 {
            true => ("ms", 1, 1e3),
            false => ("s", 2, 1.0),
        };
        let [median, min, max] = [median, min, max].map(|time| time * scale);
        write!(
            f,
            "{median:.digits$} {unit} ({min:.digits$} to {max:.digits$})"
        )
    }
}

/// How long inflating and deflating took with one driver.
#[derive(Default)]
struct RoundTrips {
    inflate: Times,
    deflate: Times,
}

fn faster_than_c(setup: &Setup) -> Result<()> {
    let (mut rust, mut c) = (RoundTrips::default(), RoundTrips::default());
    // One after the other, so that whatever else the machine does meets both of them.
    for _ in 0..RUNS {
        measure(setup, Driver::Rust, &mut rust)?;
        measure(setup, Driver::C, &mut c)?;
    }
    let compare = |what: &str, rust: &Times, c: &Times, limit: f64| -> Result<()> {
        let ratio = rust.ratio(c);
        setup.note(format!(
            "{what} 7 of 8 GiB: {rust}, C driver {c}, ratio {ratio:.2}"
        ));
        ensure!(
            ratio <= limit,
            "{what} takes {ratio:.2} of the C driver's time, not {limit}"
        );
        Ok(())
    };
    let inflate = compare("inflating", &rust.inflate, &c.inflate, INFLATE_LIMIT);
    let deflate = compare("deflating", &rust.deflate, &c.deflate, DEFLATE_LIMIT);
    inflate.and(deflate)
}

fn measure(setup: &Setup, driver: Driver, times: &mut RoundTrips) -> Result<()> {
    vm::run(&setup.config().memory(Size::gib(8)), |guest| {
        guest.insmod(driver, &[])?;
        times.inflate.add(guest.balloon().settle(Size::gib(7))?);
        times.deflate.add(guest.balloon().settle(Size::default())?);
        guest.rmmod(driver)
    })
}

/// The one in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let times = Times(vec![3.0, 1.0, 2.0]);
        assert!((times.median() - 2.0).abs() < f64::EPSILON);
        assert_eq!(times.to_string(), "2.00 s (1.00 to 3.00)");
    }
}
