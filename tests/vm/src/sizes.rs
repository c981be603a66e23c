// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon has the size that the host asks for, and both sides agree on it.

use anyhow::{Result, ensure};
use vm::{Guest, Size};

use crate::{BOTH_DRIVERS, BOTH_KERNELS, Scenario, Setup};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "inflate_deflate",
    proves: "the balloon takes every size it is asked for, and both sides agree on it",
    kernels: BOTH_KERNELS,
    drivers: BOTH_DRIVERS,
    run: inflate_deflate,
}];

fn inflate_deflate(setup: &Setup) -> Result<()> {
    vm::run(&setup.config(), |guest| {
        guest.insmod(setup.driver, &[])?;
        // Up and down, by much and by little, by a page, and by what no block of pages divides.
        for size in [
            Size::mib(256),
            Size::mib(640),
            Size::mib(1),
            Size::pages(1),
            Size::pages(3),
            Size::mib(700) + Size::pages(511),
            Size::mib(128) + Size::pages(1),
            Size::default(),
        ] {
            guest.balloon().settle(size)?;
            check_size(guest, size)?;
        }
        guest.rmmod(setup.driver)
    })
}

/// Checks from both sides that the balloon has a size.
pub(crate) fn check_size(guest: &Guest, size: Size) -> Result<()> {
    let seen = guest.balloon().size()?;
    ensure!(seen == size, "the host sees a balloon of {seen}, where {size} was asked for");
    let pages = Size::pages(guest.vmstat("nr_balloon_pages")?);
    ensure!(pages == size, "the guest counts {pages} in balloons, where {size} was asked for");
    Ok(())
}
