// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The target of QEMU's own balloon, which QEMU does not report.
//!
//! It is what the manager has set last. When another program sets a larger one, the balloon outgrows that target, which
//! shows.

use std::time::{Duration, Instant};

/// A balloon that grows beyond its target by more than this has another target.
const SLACK: u64 = 4 << 20;

/// For so long the balloon may still grow towards the target before: the guest has not seen the new one yet.
const DELAY: Duration = Duration::from_secs(2);

/// The target, and how the balloon has grown under it. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    bytes: Option<u64>,
    /// The smallest size since the guest has seen the target, and the time of the target.
    least: u64,
    since: Option<Instant>,
}

impl Target {
    /// The manager has set this target, or may have.
    pub(crate) fn set(&mut self, bytes: u64, now: Instant) {
        (self.bytes, self.since) = (Some(bytes), Some(now));
    }

    /// The balloon has this size. Returns the target.
    pub(crate) fn observe(&mut self, size: u64, now: Instant) -> u64 {
        let is_new = self.since.is_some_and(|since| now - since < DELAY);
        self.least = if is_new { size } else { self.least.min(size) };
        let outgrows = |target: u64| size > target.max(self.least).saturating_add(SLACK);
        let target = self.bytes.filter(|&target| !outgrows(target));
        if target.is_none() {
            self.least = size;
        }
        *self.bytes.insert(target.unwrap_or(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_balloon_that_still_grows_after_a_smaller_target_has_that_target() {
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut target = Target::default();
        target.set(3000 * MIB, after(0));
        assert_eq!(target.observe(2000 * MIB, after(1000)), 3000 * MIB);
        target.set(1500 * MIB, after(1900));
        assert_eq!(target.observe(2100 * MIB, after(1900)), 1500 * MIB);
        assert_eq!(target.observe(2150 * MIB, after(2000)), 1500 * MIB);
        for (size, time) in [(1800, 3000), (1500, 5000)] {
            assert_eq!(target.observe(size * MIB, after(time)), 1500 * MIB);
        }
        // Another program sets a target, and the balloon grows in small steps.
        assert_eq!(target.observe(1503 * MIB, after(5100)), 1500 * MIB);
        assert_eq!(target.observe(1506 * MIB, after(5200)), 1506 * MIB);
    }

    #[test]
    fn a_guest_that_takes_memory_back_has_the_same_target() {
        let start = Instant::now();
        let mut target = Target::default();
        // The manager has just started, and the guest runs out of memory.
        for size in [1000, 600, 800] {
            assert_eq!(target.observe(size * MIB, start), 1000 * MIB);
        }
        assert_eq!(target.observe(1200 * MIB, start), 1200 * MIB);
    }
}
