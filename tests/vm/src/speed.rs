// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver is faster than the C driver.

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

/// The times of one driver, in seconds.
#[derive(Default)]
struct Times {
    inflate: Vec<f64>,
    deflate: Vec<f64>,
}

fn faster_than_c(setup: &Setup) -> Result<()> {
    let (mut rust, mut c) = (Times::default(), Times::default());
    // One after the other, so that whatever else the machine does meets both of them.
    for _ in 0..RUNS {
        measure(setup, Driver::Rust, &mut rust)?;
        measure(setup, Driver::C, &mut c)?;
    }
    let compare = |what: &str, rust: &[f64], c: &[f64], limit: f64| -> Result<()> {
        let (rust, c) = (median(rust), median(c));
        let ratio = rust / c;
        setup.note(format!(
            "{what} 7 of 8 GiB: {rust:.2} s, C driver {c:.2} s, ratio {ratio:.2}"
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

fn measure(setup: &Setup, driver: Driver, times: &mut Times) -> Result<()> {
    vm::run(&setup.config().memory(Size::gib(8)), |guest| {
        guest.insmod(driver, &[])?;
        let seconds = |time: Duration| time.as_secs_f64();
        times
            .inflate
            .push(seconds(guest.balloon().settle(Size::gib(7))?));
        times
            .deflate
            .push(seconds(guest.balloon().settle(Size::default())?));
        guest.rmmod(driver)
    })
}

/// The one in the middle.
pub(crate) fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
    }
}
