// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the manager would do, and save, if it did not only observe.

use std::fmt;

use balloon_policy::{Millis, Pages, Sample, Vm};

use crate::text::size;

/// A target that the manager would set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proposal {
    pub(crate) target: Pages,
    /// The balloon's real target. If another program changes that, the proposal ends.
    pub(crate) of: Pages,
}

impl Proposal {
    /// The VM after this target, if its guest gives what it is asked for as far as it has available memory.
    pub(crate) fn apply(&self, vm: Vm) -> Vm {
        let available = vm.sample.map_or(0, |sample| sample.available);
        let missing = self.target.saturating_sub(vm.size);
        let size = (vm.size + missing.min(available)).min(self.target);
        let moved = |pages: Pages| (pages + vm.size).saturating_sub(size);
        Vm {
            target: self.target,
            size,
            resident: vm
                .resident
                .map(|pages| pages.min(vm.memory.saturating_sub(size))),
            sample: vm.sample.map(|sample| Sample {
                free: moved(sample.free),
                available: moved(sample.available),
                ..sample
            }),
            ..vm
        }
    }
}

/// What the host gives to a VM, as far as known.
fn given(vm: &Vm) -> Pages {
    let usable = vm.memory.saturating_sub(vm.size);
    vm.resident.unwrap_or(usable)
}

/// How much less the host would give to the VMs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Savings {
    /// Now.
    pub(crate) pages: Pages,
    /// Pages times milliseconds, until `last`.
    sum: u128,
    first: Option<Millis>,
    last: Millis,
}

impl Savings {
    /// The VMs are and would be these now.
    pub(crate) fn update<'a>(&mut self, now: Millis, vms: impl Iterator<Item = (&'a Vm, &'a Vm)>) {
        self.first.get_or_insert(now);
        self.sum += u128::from(self.pages) * u128::from(now.saturating_sub(self.last));
        self.last = now;
        let (mut present, mut after): (Pages, Pages) = (0, 0);
        for (is, would_be) in vms {
            present += given(is);
            after += given(would_be);
        }
        self.pages = present.saturating_sub(after);
    }
}

impl fmt::Display for Savings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.last.saturating_sub(self.first.unwrap_or(self.last));
        let mean = self.sum.checked_div(u128::from(time)).unwrap_or(0);
        let mean = Pages::try_from(mean).unwrap_or(Pages::MAX);
        write!(
            f,
            "{} on average over {} s, and {} at the end",
            size(mean),
            time / 1_000,
            size(self.pages)
        )
    }
}

#[cfg(test)]
mod tests {
    use balloon_policy::{GIB, MIB, Settings, VmId};

    use super::*;

    /// A VM of 4 GiB with a balloon of 1 GiB and this much available memory.
    fn vm(available: Pages, resident: Option<Pages>) -> Vm {
        let settings = Settings {
            floor: 0,
            ceiling: 4 * GIB,
            weight: 1,
        };
        Vm {
            resident,
            sample: Some(Sample {
                taken: 0,
                free: available / 2,
                available,
                stalls: 0,
                swapped_in: 0,
                kills: 0,
            }),
            ..Vm::new(VmId(0), settings, 4 * GIB, GIB)
        }
    }

    #[test]
    fn a_guest_gives_what_it_does_not_use() {
        let after = |target, available| {
            let vm = Proposal { target, of: GIB }.apply(vm(available, Some(3 * GIB)));
            let sample = vm.sample.unwrap();
            (vm.size, sample.available, sample.free, vm.resident)
        };
        assert_eq!(after(2 * GIB, 2 * GIB), (2 * GIB, GIB, 0, Some(2 * GIB)));
        let all = (GIB + MIB, 0, 0, Some(3 * GIB - MIB));
        assert_eq!(after(2 * GIB, MIB), all);
        // It gets memory that it has not touched yet.
        assert_eq!(after(0, MIB), (0, GIB + MIB, GIB + MIB / 2, Some(3 * GIB)));
    }

    #[test]
    fn savings_are_what_the_host_need_not_give() {
        let mut savings = Savings::default();
        let mut update = |now, target, resident| {
            let vm = vm(3 * GIB, resident);
            let after = Proposal { target, of: GIB }.apply(vm);
            savings.update(now, [(&vm, &after)].into_iter());
            savings.pages
        };
        assert_eq!(update(5_000, 3 * GIB, None), 2 * GIB);
        // It has touched 1.5 GiB only.
        assert_eq!(update(6_000, 3 * GIB, Some(3 * GIB / 2)), GIB / 2);
        assert_eq!(update(8_000, 0, None), 0);
        assert_eq!(
            savings.to_string(),
            "1.0 GiB on average over 3 s, and 0 B at the end"
        );
    }
}
