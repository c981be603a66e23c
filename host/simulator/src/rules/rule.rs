// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interface of a rule, and the arithmetic that rules share.

use balloon_policy::{Millis, Observation, Pages, Vm};

/// A guest's future demand, which only the oracle knows.
#[derive(Clone, Copy, Debug)]
pub struct Truth {
    /// Memory of the kernel and the processes.
    pub demand: Pages,
    /// Files that are read again and again.
    pub files: Pages,
}

/// The input of a rule.
#[derive(Clone, Debug)]
pub struct View {
    /// The host and its VMs.
    pub observation: Observation,
    /// What is known to the oracle only, for each VM. The other rules work without it.
    pub truth: Vec<Truth>,
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
pub trait Rule: Send {
    /// Its name, or that of its project.
    fn name(&self) -> &'static str;

    /// Whether guests report free pages to the host.
    fn reporting(&self) -> bool {
        false
    }

    /// What VMs of this memory have when the run begins, or nothing if they have no balloons. All have the same part.
    fn start(&self, pool: Pages, memory: &[Pages]) -> Option<Vec<Pages>> {
        let all: Pages = memory.iter().sum();
        let grant = |&memory: &Pages| {
            let grant = u128::from(memory) * u128::from(pool) / u128::from(all.max(1));
            let grant = Pages::try_from(grant).unwrap_or(Pages::MAX);
            grant.min(memory) / 100 * 98
        };
        Some(memory.iter().map(grant).collect())
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
