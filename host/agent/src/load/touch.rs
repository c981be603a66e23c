// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Touches memory and frees it, so that the host has something to take back.

use std::hint::black_box;

use anyhow::Result;

use super::{MIB, report, touch_pages};

pub(super) fn run(mib: usize) -> Result<()> {
    let mut memory = vec![0; mib * MIB];
    touch_pages(&mut memory);
    black_box(&memory);
    report(mib, 1)
}
