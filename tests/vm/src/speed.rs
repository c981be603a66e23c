// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver is faster than the C driver.

use anyhow::{Result, ensure};
use vm::{Driver, Samples, Size};

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

/// How long inflating and deflating took with one driver.
#[derive(Default)]
struct RoundTrips {
    inflate: Samples,
    deflate: Samples,
}

fn faster_than_c(setup: &Setup) -> Result<()> {
    let (mut rust, mut c) = (RoundTrips::default(), RoundTrips::default());
    // One after the other, so that whatever else the machine does meets both of them.
    for _ in 0..RUNS {
        measure(setup, Driver::Rust, &mut rust)?;
        measure(setup, Driver::C, &mut c)?;
    }
    let compare = |what: &str, rust: &Samples, c: &Samples, limit: f64| -> Result<()> {
        let ratio = rust.ratio(c);
        setup.note(format!(
            "{what} 7 of 8 GiB: {}, C driver {}, ratio {ratio:.2}",
            rust.in_seconds(),
            c.in_seconds()
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
        times
            .inflate
            .add_time(guest.balloon().settle(Size::gib(7))?);
        times
            .deflate
            .add_time(guest.balloon().settle(Size::default())?);
        guest.rmmod(driver)
    })
}
