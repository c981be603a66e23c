// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MoM of oVirt: every ten seconds all guests shrink while less than a fifth of the host's memory is free, and grow
//! otherwise, by at most 5 % or up to a fifth of free memory.

use std::collections::VecDeque;

use balloon_policy::{Millis, Pages};

use super::rule::{Rule, Timer, View, grant, target, thousandths};

const INTERVAL: Millis = 10_000;

/// Averages are of this many samples.
const SAMPLES: usize = 10;

/// Free memory of the host, in thousandths, below which guests shrink, and below which they swap.
const PRESSURE: i64 = 200;
const CRITICAL: i64 = 50;

/// Free memory that a guest should have, in thousandths.
const GUEST_FREE: i64 = 200;

#[derive(Debug, Default)]
pub(crate) struct Mom {
    timer: Timer,
    free: VecDeque<u64>,
    /// What each guest uses, its caches included.
    used: Vec<VecDeque<u64>>,
}

fn average(samples: &mut VecDeque<u64>, new: u64) -> u64 {
    samples.push_front(new);
    samples.truncate(SAMPLES);
    samples.iter().sum::<u64>() / samples.len() as u64
}

/// The new size of a guest of `size` that uses `used` of it, on a host with `free` thousandths of free memory. A
/// change of a 400th of the size is too small.
fn size(size: Pages, used: Pages, most: Pages, free: u64) -> Option<Pages> {
    let with = |part: i64| {
        let spare = i128::from(size) * i128::from(part) / 1_000;
        Pages::try_from((i128::from(used) + spare).max(0)).unwrap_or(0)
    };
    let free = i64::try_from(free).unwrap_or(i64::MAX);
    let new = if free >= PRESSURE {
        if size >= most {
            return None;
        }
        (size + size / 20).min(most).max(with(GUEST_FREE).min(most))
    } else {
        let part = match free <= CRITICAL {
            true => free - CRITICAL,
            false => GUEST_FREE * free / PRESSURE,
        };
        (size - size / 20).max(with(part))
    };
    let shrinks = free < PRESSURE;
    (!(shrinks && new > size) && new.abs_diff(size) * 400 > size).then_some(new)
}

impl Rule for Mom {
    fn name(&self) -> &'static str {
        "MoM"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), INTERVAL) {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        self.used.resize(vms.len(), VecDeque::new());
        let free = thousandths(view.pool().saturating_sub(view.resident()), view.pool());
        let free = average(&mut self.free, free);
        let vms = vms.iter().enumerate().zip(&mut self.used);
        let sizes = vms.filter_map(|((place, vm), used)| {
            let sample = vm.sample?;
            let usable = vm.memory - vm.size;
            let used = average(used, usable.saturating_sub(sample.free));
            let size = size(grant(vm), used, vm.settings.ceiling, free)?;
            Some((place, target(vm, size)?))
        });
        sizes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_shrink_with_the_free_memory_of_the_host() {
        // At 10 % a guest keeps 10 % of free memory, and at most 5 % go at a time.
        assert_eq!(size(1_000, 500, 2_000, 100), Some(950));
        assert_eq!(size(1_000, 880, 2_000, 100), Some(980));
        // At 5 % it keeps nothing; below, it has to swap.
        assert_eq!(size(1_000, 990, 2_000, 50), Some(990));
        assert_eq!(size(1_000, 990, 2_000, 20), Some(960));
    }

    #[test]
    fn guests_grow_when_the_host_has_enough() {
        assert_eq!(size(1_000, 500, 2_000, 200), Some(1_050));
        assert_eq!(size(1_000, 1_000, 2_000, 200), Some(1_200));
        assert_eq!(size(1_990, 1_000, 2_000, 200), Some(2_000));
        assert_eq!(size(2_000, 2_000, 2_000, 500), None);
    }

    #[test]
    fn small_changes_are_dropped() {
        assert_eq!(size(1_000, 898, 2_000, 100), None);
    }

    #[test]
    fn four_gib_take_seven_steps() {
        // From 2 to 6 GiB, with steps of 20 % while the guest is full.
        let (mut current, mut steps) = (2_048, 0);
        while current < 6 * 1_024 {
            current = size(current, current, 8_192, 500).expect("it grows");
            steps += 1;
        }
        assert_eq!(steps, 7);
    }
}
