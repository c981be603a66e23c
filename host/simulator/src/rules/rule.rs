// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interface of a rule, and the arithmetic that rules share.

use balloon_policy::{Millis, Observation, Pages, Vm};

use crate::guest::Guest;

/// A guest's future demand, which only the oracle knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Truth {
    /// Memory of the kernel and the processes.
    pub(crate) demand: Pages,
    /// Files that are read again and again.
    pub(crate) files: Pages,
}

/// The input of a rule.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) observation: Observation,
    pub(crate) truth: Vec<Truth>,
}

impl View {
    pub(super) fn now(&self) -> Millis {
        self.observation.now
    }

    pub(super) fn pool(&self) -> Pages {
        self.observation.pool
    }

    /// The resident memory of the VMs.
    pub(super) fn resident(&self) -> Pages {
        let vms = self.observation.vms.iter();
        vms.filter_map(|vm| vm.resident).sum()
    }
}

/// A rule that sets targets.
pub(crate) trait Rule {
    fn name(&self) -> &'static str;

    /// Whether guests report free pages to the host.
    fn reporting(&self) -> bool {
        false
    }

    /// How the balloons are when the run begins: each VM has the same part of its memory.
    fn start(&self, pool: Pages, guests: &mut [Guest]) {
        let memory: Pages = guests.iter().map(|guest| guest.memory).sum();
        for guest in guests {
            let grant = u128::from(guest.memory) * u128::from(pool) / u128::from(memory.max(1));
            let grant = Pages::try_from(grant).unwrap_or(Pages::MAX);
            guest.begin(grant.min(guest.memory) / 100 * 98);
        }
    }

    /// New targets, by the place of the VM.
    fn step(&mut self, view: &View) -> Vec<(usize, Pages)>;
}

/// A periodic action.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timer(Millis);

impl Timer {
    pub(super) fn is_due(&mut self, now: Millis, interval: Millis) -> bool {
        let due = now >= self.0;
        if due {
            self.0 = now + interval;
        }
        due
    }
}

/// The memory that a VM may have.
pub(super) fn grant(vm: &Vm) -> Pages {
    vm.memory.saturating_sub(vm.target)
}

/// The target for a grant, within the VM's bounds, or nothing if it is the present one.
pub(super) fn target(vm: &Vm, grant: Pages) -> Option<Pages> {
    let grant = grant.clamp(vm.settings.floor, vm.settings.ceiling);
    Some(vm.memory - grant).filter(|&target| target != vm.target)
}

/// `part` of `whole`, in thousandths.
pub(super) fn thousandths(part: Pages, whole: Pages) -> u64 {
    part.saturating_mul(1_000) / whole.max(1)
}
