// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Allocates more and more memory until the host stops it or the kernel kills it.

use anyhow::Result;

use super::child::{MIB, Stop, report, touch_pages};

const STEP_MIB: usize = 8;

pub(super) fn run(mib: usize, stop: Stop) -> Result<()> {
    let mut steps = Vec::new();
    while !stop.is_asked() && steps.len() * STEP_MIB < mib {
        let mut step = vec![0; STEP_MIB * MIB];
        touch_pages(&mut step);
        steps.push(step);
        report(steps.len() * STEP_MIB, 0)?;
    }
    stop.wait();
    Ok(())
}
