// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's used memory, its growth, and its recent peak.

use crate::observation::{MIB, Millis, Pages, Vm};

/// The least headroom.
const HEADROOM: Pages = 128 * MIB;

/// For how long the headroom lasts at the fastest recent growth, as a divisor of a second.
const REACTIONS_PER_SECOND: u64 = 2;

/// In which time the memory of fast growth fades to a half.
const GROWTH_HALF_LIFE: Millis = 30_000;

/// Excesses fade in steps of a second at least, so that rounding does not stop them.
const FADING_STEP: Millis = 1_000;

/// The values from the guest's statistics.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    /// Memory that the guest cannot reclaim.
    pub(crate) used: Pages,
    /// Memory that is not free.
    pub(crate) occupied: Pages,
    /// When the statistics were requested.
    taken: Millis,
    /// The fastest growth of `used`, in pages a second.
    growth: Fading,
    /// The most that was used.
    peak: Fading,
}

impl Estimate {
    /// Takes the VM's statistics into account, which came while its balloon had its present size.
    pub(crate) fn update(last: Option<Self>, vm: &Vm, peak_half_life: Millis) -> Option<Self> {
        let sample = vm.sample?;
        let usable = vm.memory.saturating_sub(vm.size);
        // A guest cannot use what it has never touched.
        let most = vm.touched().unwrap_or(usable).min(usable);
        let used = usable.saturating_sub(sample.available).min(most);
        let fresh = Self {
            used,
            occupied: usable.saturating_sub(sample.free),
            taken: sample.taken,
            growth: Fading::new(0, sample.taken),
            peak: Fading::new(used, sample.taken),
        };
        let Some(last) = last else {
            return Some(fresh);
        };
        let time = sample.taken.saturating_sub(last.taken);
        if time == 0 {
            // It is not newer.
            return Some(last);
        }
        let growth = used.saturating_sub(last.used).saturating_mul(1_000) / time;
        Some(Self {
            growth: last.growth.raise(growth, 0, sample.taken, GROWTH_HALF_LIFE),
            peak: last.peak.raise(used, used, sample.taken, peak_half_life),
            ..fresh
        })
    }

    /// The same without the recent peak.
    pub(crate) const fn without_peak(self) -> Self {
        Self {
            peak: Fading::new(self.used, self.taken),
            ..self
        }
    }

    /// The available memory that the guest should have, so that it does not run out before it gets
    /// more.
    pub(crate) fn headroom(&self, memory: Pages) -> Pages {
        let growth = self.growth.value / REACTIONS_PER_SECOND;
        let most = (memory / 8).max(HEADROOM);
        HEADROOM.max(self.used / 10).max(growth).min(most)
    }

    /// Memory that the guest can use: its caches, and the memory that it used recently.
    pub(crate) fn wanted(&self) -> Pages {
        self.occupied.max(self.peak.value)
    }
}

/// A maximum that fades.
#[derive(Clone, Copy, Debug)]
struct Fading {
    value: Pages,
    since: Millis,
}

impl Fading {
    const fn new(value: Pages, now: Millis) -> Self {
        Self { value, since: now }
    }

    /// The larger of `value` and the rest of the maximum, which fades towards `rest`.
    fn raise(self, value: Pages, rest: Pages, now: Millis, half_life: Millis) -> Self {
        if value >= self.value {
            return Self::new(value, now);
        }
        let time = now.saturating_sub(self.since);
        if time < FADING_STEP {
            return self;
        }
        let excess = faded(self.value.saturating_sub(rest), time, half_life.max(1));
        Self::new(value.max(rest.saturating_add(excess)), now)
    }
}

/// The rest of `excess` after `time`: a half after each half-life, and between two of them a straight line.
fn faded(excess: Pages, time: Millis, half_life: Millis) -> Pages {
    let halves = u32::try_from(time / half_life).unwrap_or(u32::MAX);
    let Some(excess) = excess.checked_shr(halves) else {
        return 0;
    };
    let part = u128::from(excess) * u128::from(time % half_life) / u128::from(half_life) / 2;
    // At least one page is removed each time, so that the excess becomes 0.
    excess.saturating_sub(Pages::try_from(part).unwrap_or(excess).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maximum_fades_to_a_half_and_then_away() {
        assert_eq!(faded(1_000, 10_000, 10_000), 499);
        assert_eq!(faded(1_000, 5_000, 10_000), 750);
        assert_eq!(faded(1_000, 1_000_000, 10_000), 0);
        assert_eq!(faded(u64::MAX, u64::MAX, 1), 0);
        let mut peak = Fading::new(1_000, 0);
        for second in 1..1_000 {
            peak = peak.raise(100, 100, second * 1_000, 10_000);
        }
        assert_eq!(peak.value, 100);
    }

    #[test]
    fn a_maximum_rises_at_once() {
        let peak = Fading::new(1_000, 0).raise(2_000, 0, 1, 10_000);
        assert_eq!((peak.value, peak.since), (2_000, 1));
    }
}
