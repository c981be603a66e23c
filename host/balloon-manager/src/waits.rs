// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long guests wait for the memory that they need.

use balloon_control::Exposition;
use balloon_policy::{Account, MIB, Millis, Pages, Vm};

/// The bounds of the histogram, in milliseconds and as text in seconds.
const BOUNDS: [(Millis, &str); 10] = [
    (10, "0.01"),
    (25, "0.025"),
    (50, "0.05"),
    (100, "0.1"),
    (250, "0.25"),
    (500, "0.5"),
    (1_000, "1"),
    (2_500, "2.5"),
    (10_000, "10"),
    (60_000, "60"),
];

/// The policy makes no smaller change.
const SLACK: Pages = 4 * MIB;

/// A guest in need waits for memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    since: Millis,
    /// What it needs in all.
    need: Pages,
}

impl Wait {
    /// The guest's wait now, if it waits, and how long one was that has ended with the memory. A need that goes away by
    /// itself does not count.
    pub(crate) fn follow(
        this: Option<Self>,
        vm: &Vm,
        account: &Account,
        now: Millis,
    ) -> (Option<Self>, Option<Millis>) {
        let enough = vm.memory.saturating_sub(vm.size) + SLACK.max(vm.granule);
        match this {
            Some(wait) if enough >= wait.need => (None, Some(now.saturating_sub(wait.since))),
            Some(_) if enough >= account.need => (None, None),
            None if account.pressed.is_some() && enough < account.need => {
                let wait = Self {
                    since: now,
                    need: account.need,
                };
                (Some(wait), None)
            }
            other => (other, None),
        }
    }
}

/// A histogram of waits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    /// Those up to each bound.
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum: Millis,
}

impl Waits {
    /// A guest has waited for so long.
    pub(crate) fn add(&mut self, time: Millis) {
        for (count, (bound, _)) in self.counts.iter_mut().zip(BOUNDS) {
            *count += u64::from(time <= bound);
        }
        self.count += 1;
        self.sum += time;
    }

    pub(crate) fn show(&self, metrics: &mut Exposition) {
        metrics.head(
            "histogram",
            "need_seconds",
            "Time from a guest's need to memory that its device confirms.",
        );
        for (count, (_, bound)) in self.counts.iter().zip(BOUNDS) {
            metrics.sample("need_seconds_bucket", Some(("le", bound)), count);
        }
        metrics.sample("need_seconds_bucket", Some(("le", "+Inf")), self.count);
        let sum = format!("{}.{:03}", self.sum / 1_000, self.sum % 1_000);
        metrics.sample("need_seconds_sum", None, sum);
        metrics.sample("need_seconds_count", None, self.count);
    }
}

#[cfg(test)]
mod tests {
    use balloon_policy::{GIB, Pressure, Settings, VmId};

    use super::*;

    /// A VM of 4 GiB that can use so much of it.
    const fn vm(usable: Pages) -> Vm {
        let settings = Settings {
            floor: 0,
            ceiling: 4 * GIB,
            weight: 1,
        };
        Vm::new(VmId(0), settings, 4 * GIB, 4 * GIB - usable)
    }

    const fn account(need: Pages, pressed: Option<Pressure>) -> Account {
        Account {
            vm: VmId(0),
            memory: 4 * GIB,
            grant: GIB,
            charge: GIB,
            used: None,
            headroom: 0,
            kept: 0,
            need,
            want: need,
            share: GIB,
            fallback: GIB,
            spared: None,
            pressed,
        }
    }

    #[test]
    fn a_wait_is_from_the_need_to_the_memory() {
        const PRESSED: Option<Pressure> = Some(Pressure::Stalls);
        let (mut wait, mut waits) = (None, Vec::new());
        for (now, usable, need, pressed) in [
            (0, GIB, 2 * GIB, None),
            (10, GIB, GIB + SLACK, PRESSED),
            (20, GIB, 2 * GIB, PRESSED),
            (30, GIB, 3 * GIB, PRESSED),
            (70, 2 * GIB, 3 * GIB, PRESSED),
            // What it needs now is another need.
            (80, 2 * GIB, 3 * GIB, PRESSED),
            (90, 2 * GIB, GIB, None),
            (95, 3 * GIB, GIB, None),
        ] {
            let (next, ended) = Wait::follow(wait, &vm(usable), &account(need, pressed), now);
            wait = next;
            waits.extend(ended);
        }
        assert_eq!(waits, [50]);
    }

    #[test]
    fn waits_are_in_all_buckets_above_them() {
        let mut waits = Waits::default();
        for time in [25, 26, 70_000] {
            waits.add(time);
        }
        let mut metrics = Exposition::new("m");
        waits.show(&mut metrics);
        let text = metrics.into_text();
        for line in [
            "m_need_seconds_bucket{le=\"0.01\"} 0",
            "m_need_seconds_bucket{le=\"0.025\"} 1",
            "m_need_seconds_bucket{le=\"60\"} 2",
            "m_need_seconds_bucket{le=\"+Inf\"} 3",
            "m_need_seconds_sum 70.051",
            "m_need_seconds_count 3",
        ] {
            assert!(text.lines().any(|one| one == line), "{text}");
        }
    }
}
