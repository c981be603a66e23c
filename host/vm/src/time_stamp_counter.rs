// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processor's time stamp counter, which an emulated guest reads as well.

use std::fs;
use std::sync::LazyLock;

use quanta::Clock;

/// Processor flags without which the counter is not read: it would stop, or change its frequency.
const FLAGS: [&str; 3] = ["constant_tsc", "nonstop_tsc", "rdtscp"];

/// The number of ticks for the calculation, enough for a precision of 1 kHz.
const TICKS: u64 = 1 << 40;

/// The counter's frequency in kHz, if it is constant. The first call takes up to a fifth of a second.
pub(crate) fn khz() -> Option<u64> {
    static KHZ: LazyLock<Option<u64>> = LazyLock::new(measure);
    *KHZ
}

fn measure() -> Option<u64> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let nanoseconds = is_constant(&cpuinfo).then(|| Clock::new().delta_as_nanos(0, TICKS))?;
    u64::try_from(u128::from(TICKS) * 1_000_000 / u128::from(nanoseconds)).ok()
}

/// Whether the first processor of `cpuinfo` has the flags.
fn is_constant(cpuinfo: &str) -> bool {
    let flags: Vec<_> = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .into_iter()
        .flat_map(str::split_whitespace)
        .collect();
    FLAGS.iter().all(|flag| flags.contains(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_stops_has_no_frequency() {
        assert!(is_constant(
            "processor : 0\nflags : fpu rdtscp constant_tsc nonstop_tsc\n"
        ));
        assert!(!is_constant("flags : fpu rdtscp constant_tsc\n"));
        assert!(!is_constant("Features : fp asimd\n"));
    }
}
