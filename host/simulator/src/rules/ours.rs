// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! This project's policy, and an oracle that knows what guests will want.

use balloon_policy::{Claim, MIB, Pages, Policy, Profile, share};

use super::rule::{Rule, View, grant};

#[derive(Debug)]
pub(crate) struct Ours {
    name: &'static str,
    policy: Policy,
}

impl Ours {
    pub(crate) fn new(name: &'static str, profile: Profile) -> Self {
        Self {
            name,
            policy: Policy::new(profile),
        }
    }
}

impl Rule for Ours {
    fn name(&self) -> &'static str {
        self.name
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        let decision = self.policy.step(&view.observation);
        let actions = decision.actions.into_iter();
        actions
            .map(|action| (action.vm.0 as usize, action.target))
            .collect()
    }
}

/// Each guest has what it will want, and the caches that are worth it, as far as the pool goes.
#[derive(Debug)]
pub(crate) struct Oracle;

/// What a guest needs free.
const HEADROOM: Pages = 128 * MIB;

/// Smaller changes are not made.
const LEAST_CHANGE: Pages = 16 * MIB;

impl Rule for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        let vms = &view.observation.vms;
        let usable = |place: usize| vms[place].memory - vms[place].size;
        let fixed = |place: usize| !vms[place].driver;
        let mut capacity = view.pool();
        let claims = |floors: Option<&[Pages]>| {
            let claim = |(place, vm): (usize, &balloon_policy::Vm)| {
                let truth = view.truth[place];
                let need = (truth.demand + HEADROOM).min(vm.memory);
                let want = floors.map_or(need, |_| (need + truth.files).min(vm.memory));
                let floor = floors.map_or(0, |floors| floors[place]);
                match fixed(place) {
                    true => Claim {
                        floor: 0,
                        want: 0,
                        weight: 1,
                    },
                    false => Claim {
                        floor,
                        want,
                        weight: 1,
                    },
                }
            };
            vms.iter().enumerate().map(claim).collect::<Vec<_>>()
        };
        for place in (0..vms.len()).filter(|&place| fixed(place)) {
            capacity = capacity.saturating_sub(usable(place));
        }
        let needs = share(capacity, &claims(None));
        let shares = share(capacity, &claims(Some(&needs)));
        let vms = vms.iter().enumerate().zip(shares);
        let targets = vms.filter_map(|((place, vm), share)| {
            let target = vm.memory - share;
            let changes = share.abs_diff(grant(vm)) >= LEAST_CHANGE;
            (!fixed(place) && changes).then_some((place, target))
        });
        targets.collect()
    }
}
