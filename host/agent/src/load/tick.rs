// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sleeps repeatedly for the same time, and measures how late it wakes up.

use std::thread;
use std::time::{Duration, Instant};

use agent::Progress;
use anyhow::Result;

use super::child::{Stop, say};

/// How often it reports the delay.
const SAYINGS: Duration = Duration::from_millis(50);

pub(super) fn run(microseconds: u64, stop: Stop) -> Result<()> {
    let period = Duration::from_micros(microseconds);
    let report = |passes, longest: Duration| {
        say(&Progress {
            mib: 0,
            passes,
            stall_us: longest.as_micros().try_into()?,
        })
    };
    let (mut longest, mut passes, mut said) = (Duration::ZERO, 0, Instant::now());
    while !stop.is_asked() {
        let due = Instant::now() + period;
        thread::sleep(period);
        longest = longest.max(due.elapsed());
        passes += 1;
        if said.elapsed() > SAYINGS {
            said = Instant::now();
            report(passes, longest)?;
        }
    }
    report(passes, longest)
}
