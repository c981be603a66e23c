// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The step from an observation to actions.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::fair::{Claim, share};
use crate::observation::{
    Account, Action, Cause, Decision, HostPressure, MIB, Millis, Observation, Pages, Spared, Vm,
    VmId,
};
use crate::tracker::{GIVING, Tracker};

/// Memory that is reserved for guests that need memory at once, while other guests still inflate.
const FAST_RESERVE: Pages = 512 * MIB;

/// The target of a VM that is not short of memory stays the same for this long.
const INTERVAL: Millis = 10_000;

/// The smallest raise just after another one, while other VMs give memory.
const LEAST_PART: Pages = 512 * MIB;

/// Smaller changes are not worth one, unless a guest needs them.
const LEAST_CHANGE: Pages = 32 * MIB;

/// No change is smaller than this.
const LEAST_URGENT_CHANGE: Pages = 4 * MIB;

/// For how long a VM keeps memory that it does not use, as long as no other VM needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// For an hour or so.
    Performance,
    /// For some minutes.
    #[default]
    Balanced,
    /// For half a minute or so.
    Density,
}

impl Profile {
    /// In which time the excess of the recent peak fades to a half.
    const fn peak_half_life(self) -> Millis {
        match self {
            Self::Performance => 3_600_000,
            Self::Balanced => 300_000,
            Self::Density => 10_000,
        }
    }
}

/// Why there is no room for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The whole pool.
    pub pool: Pages,
    /// The memory that stays free.
    pub reserve: Pages,
    /// The floors of the VMs.
    pub floors: Pages,
    /// The existing reservations.
    pub reserved: Pages,
    /// The requested reservation.
    pub asked: Pages,
}

/// Decides how the memory of a host is divided between its VMs.
#[derive(Debug, Default)]
pub struct Policy {
    profile: Profile,
    now: Millis,
    number: u64,
    trackers: BTreeMap<VmId, Tracker>,
    /// The reservations that have their memory.
    admitted: BTreeSet<u32>,
}

/// A step in progress.
struct Step<'a> {
    observation: &'a Observation,
    decision: Decision,
    /// Memory that no VM can touch.
    free: Pages,
    /// The part of it that is for guests in need.
    fast: Pages,
    /// What VMs were asked for a moment ago.
    coming: Pages,
    /// What guests in need, reservations and the fast reserve lack beyond that.
    missing: Pages,
}

impl Policy {
    /// A policy that knows no VM yet.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            ..Self::default()
        }
    }

    /// Changes the profile.
    pub const fn set_profile(&mut self, profile: Profile) {
        self.profile = profile;
    }

    /// Whether `asked` can be reserved in addition to what is reserved and to the floors of the VMs.
    ///
    /// # Errors
    ///
    /// There is no room for it.
    pub fn admit(observation: &Observation, asked: Pages) -> Result<(), Refusal> {
        let (pool, reserve) = (observation.pool, observation.reserve);
        let sum = |pages: &mut dyn Iterator<Item = Pages>| pages.fold(0, Pages::saturating_add);
        let floors = sum(&mut observation.vms.iter().map(|vm| vm.settings.floor));
        let reserved = sum(&mut observation.reservations.iter().map(|one| one.pages));
        let taken = sum(&mut [reserve, floors, reserved, asked].into_iter());
        match taken > pool {
            true => Err(Refusal {
                pool,
                reserve,
                floors,
                reserved,
                asked,
            }),
            false => Ok(()),
        }
    }

    /// Returns the decisions for now. The clock does not go back: an older observation counts as
    /// one of the same moment as its predecessor.
    pub fn step(&mut self, observation: &Observation) -> Decision {
        self.now = self.now.max(observation.now);
        self.track(observation);
        let reserve = scaled(observation.reserve, observation.pressure);
        let limit = observation.pool.saturating_sub(reserve);
        let fast = FAST_RESERVE.max(observation.pool / 100).min(limit / 8);
        let charged = self.charged(observation, Tracker::charge);
        let expected = self.charged(observation, Tracker::expected_charge);
        let accounts = observation.vms.iter().map(|vm| {
            let tracker = &self.trackers[&vm.id];
            tracker.account(vm, self.now, expected > limit)
        });
        let mut step = Step {
            observation,
            decision: Decision {
                capacity: limit.saturating_sub(fast),
                charged,
                accounts: accounts.collect(),
                ..Decision::default()
            },
            free: limit.saturating_sub(charged),
            fast,
            coming: self.coming(observation),
            missing: match expected > limit.saturating_sub(fast / 2) {
                true => expected.saturating_sub(limit - fast),
                false => 0,
            },
        };
        step.divide(&self.admitted, &self.trackers);
        self.raise(&mut step);
        self.cut(&mut step);
        step.decision
    }

    fn track(&mut self, observation: &Observation) {
        let Self { now, trackers, .. } = self;
        let mut known = std::mem::take(trackers);
        for vm in &observation.vms {
            let mut tracker = known.remove(&vm.id).unwrap_or_else(|| Tracker::new(*now));
            tracker.observe(vm, *now, self.profile.peak_half_life());
            trackers.insert(vm.id, tracker);
        }
        self.admitted
            .retain(|&id| observation.reservations.iter().any(|one| one.id == id));
    }

    /// The memory that VMs can touch, by this charge of each, and the reservations that have their memory.
    fn charged(&self, observation: &Observation, charge: fn(&Tracker, &Vm) -> Pages) -> Pages {
        let vms = observation.vms.iter();
        let charges = vms.map(|vm| charge(&self.trackers[&vm.id], vm));
        let admitted = observation
            .reservations
            .iter()
            .filter(|one| self.admitted.contains(&one.id))
            .map(|one| one.pages);
        charges.chain(admitted).fold(0, Pages::saturating_add)
    }

    fn coming(&self, observation: &Observation) -> Pages {
        let vms = observation.vms.iter();
        let coming = vms.map(|vm| self.trackers[&vm.id].coming(vm, self.now));
        coming.fold(0, Pages::saturating_add)
    }

    /// Gives memory to those below their share, to the neediest first, as far as it is free.
    fn raise(&mut self, step: &mut Step<'_>) {
        let vms = step
            .observation
            .vms
            .iter()
            .zip(step.decision.accounts.clone());
        let (mut short, mut others): (Vec<_>, Vec<_>) = vms
            .filter(|(vm, account)| is_movable(account) && account.share > reached(vm, account))
            .partition(|(vm, account)| {
                // A sign of pressure raises the need by more than that, or to the ceiling. Until the next sign the need
                // grows slowly.
                let missing = account.need.saturating_sub(account.grant);
                let is_last = account.need >= vm.settings.ceiling.min(vm.memory);
                missing >= least_change(vm) || (missing > 0 && is_last)
            });
        for order in [&mut short, &mut others] {
            order.sort_by_key(|(vm, account)| {
                let part = u128::from(account.grant) * 1_000 / u128::from(account.share);
                (part, vm.id)
            });
        }
        for (vm, account) in &short {
            let cause = account.pressed.map_or(Cause::Wanted, Cause::Pressed);
            let least = self.least_raise(step, vm, account);
            let given = self.give(step, vm, account, cause, least);
            let missing = account.share.saturating_sub(given);
            if missing > LEAST_URGENT_CHANGE {
                step.missing = step.missing.saturating_add(missing);
            }
        }
        self.reserve(step);
        step.free = step.free.saturating_sub(step.fast);
        for (vm, account) in &others {
            if self.is_due(vm) {
                self.give(step, vm, account, Cause::Wanted, least_change(vm));
            }
        }
    }

    /// The smallest raise for a guest in need. While other VMs give memory, it comes in many small parts.
    fn least_raise(&self, step: &Step<'_>, vm: &Vm, account: &Account) -> Pages {
        let just_now = self.trackers[&vm.id].moved_within(GIVING, self.now);
        let missing = account.share.saturating_sub(account.grant);
        match just_now && step.coming > 0 {
            true => missing.clamp(LEAST_URGENT_CHANGE, LEAST_PART),
            false => LEAST_URGENT_CHANGE,
        }
    }

    /// Raises the grant of a VM to its share, or as far as free memory goes. Returns the grant then.
    fn give(
        &mut self,
        step: &mut Step<'_>,
        vm: &Vm,
        account: &Account,
        cause: Cause,
        least: Pages,
    ) -> Pages {
        let affordable = account.charge.saturating_add(step.free);
        let balloon = vm.memory.saturating_sub(account.share.min(affordable));
        // Rounded up: the VM does not get more than that.
        let target = balloon.next_multiple_of(vm.granule.max(1));
        let grant = vm.memory.saturating_sub(target);
        if grant < account.grant.saturating_add(least) {
            return account.grant;
        }
        let release = step
            .release(vm, account, target)
            .min(affordable.saturating_sub(grant));
        let touchable = grant.saturating_add(release);
        step.free = step
            .free
            .saturating_sub(touchable.saturating_sub(account.charge));
        self.send(step, vm, account, (target, release), cause);
        grant
    }

    /// Gives reservations their memory.
    fn reserve(&mut self, step: &mut Step<'_>) {
        for reservation in &step.observation.reservations {
            if self.admitted.contains(&reservation.id) {
                continue;
            }
            if reservation.pages <= step.free {
                step.free -= reservation.pages;
                self.admitted.insert(reservation.id);
                step.decision.admitted.push(reservation.id);
            } else {
                step.missing = step.missing.saturating_add(reservation.pages - step.free);
            }
        }
    }

    /// Lowers the grants of VMs that have more than their share: at once until that covers what is missing, and those
    /// with the most to spare first.
    fn cut(&mut self, step: &mut Step<'_>) {
        let vms = step.observation.vms.iter();
        let mut vms: Vec<_> = vms.zip(step.decision.accounts.clone()).collect();
        vms.sort_by_key(|(_, account)| Reverse(account.grant.saturating_sub(account.share)));
        step.missing = step.missing.saturating_sub(step.coming);
        for (vm, account) in vms {
            let granule = vm.granule.max(1);
            if account.spared == Some(Spared::Uncooperative) {
                // Rounded up: the VM does not get more than it has.
                let target = vm.size.next_multiple_of(granule);
                if target < self.trackers[&vm.id].target(vm) {
                    self.send(step, vm, &account, (target, 0), Cause::Abandoned);
                }
                continue;
            }
            let excess = account.grant.saturating_sub(account.share);
            let spared = match account.spared {
                // Other VMs wait for memory that it does not need.
                Some(Spared::Starting) => step.missing == 0,
                other => other.is_some(),
            };
            if spared || excess < least_change(vm) || !(step.missing > 0 || self.is_due(vm)) {
                continue;
            }
            // Rounded down: the VM keeps at least its share.
            let target = (vm.memory - account.share) / granule * granule;
            if target > vm.memory - account.grant {
                let cause = if account.share < account.want {
                    Cause::Contended
                } else if account.share == vm.settings.ceiling {
                    Cause::Ceiling
                } else {
                    Cause::Unused
                };
                // The VM is not charged more than before.
                let taken = target - (vm.memory - account.grant);
                let release = step.release(vm, &account, target).min(taken);
                step.missing = step.missing.saturating_sub(taken - release);
                self.send(step, vm, &account, (target, release), cause);
            }
        }
    }

    /// Whether the last change is long enough ago for one that is not urgent.
    fn is_due(&self, vm: &Vm) -> bool {
        !self.trackers[&vm.id].moved_within(INTERVAL, self.now)
    }

    fn send(
        &mut self,
        step: &mut Step<'_>,
        vm: &Vm,
        account: &Account,
        (target, release): (Pages, Pages),
        cause: Cause,
    ) {
        self.number += 1;
        let Some(tracker) = self.trackers.get_mut(&vm.id) else {
            return;
        };
        let action = Action {
            number: self.number,
            vm: vm.id,
            target,
            before: tracker.target(vm),
            release,
            cause,
            account: *account,
        };
        tracker.send(&action, self.now);
        step.decision.actions.push(action);
    }
}

impl Step<'_> {
    /// By how much the VM's device may lower this target by itself: an equal part of a quarter of the fast reserve.
    fn release(&self, vm: &Vm, account: &Account, target: Pages) -> Pages {
        let vms = self.observation.vms.iter();
        let count = vms.filter(|vm| vm.release.offered).count();
        let part = self.fast / 4 / u64::try_from(count.max(1)).unwrap_or(u64::MAX);
        let grant = vm.memory.saturating_sub(target);
        let most = vm.settings.ceiling.saturating_sub(grant).min(target);
        match vm.release.offered && account.spared.is_none() {
            true => part.min(most),
            false => 0,
        }
    }

    /// Divides the capacity: first what guests need, then what they want beyond that. A reservation that waits for its
    /// memory comes between the two: guests that run do not starve for one that is to start. For needs that exceed the
    /// capacity, there is the fast reserve.
    fn divide(&mut self, admitted: &BTreeSet<u32>, trackers: &BTreeMap<VmId, Tracker>) {
        let Decision {
            capacity, accounts, ..
        } = &mut self.decision;
        let sum = |is_admitted: bool| {
            let reservations = self.observation.reservations.iter();
            reservations
                .filter(|one| admitted.contains(&one.id) == is_admitted)
                .map(|one| one.pages)
                .fold(0, Pages::saturating_add)
        };
        let vms = self.observation.vms.iter();
        let fixed = vms
            .zip(accounts.iter())
            .filter(|(_, account)| !is_movable(account))
            .map(|(vm, _)| trackers[&vm.id].expected_charge(vm));
        let rest = capacity.saturating_add(self.fast).saturating_sub(sum(true));
        let for_needs = fixed.fold(rest, Pages::saturating_sub);
        *capacity = for_needs.saturating_sub(self.fast);
        let for_wants = capacity.saturating_sub(sum(false));
        let mut movable: Vec<_> = self
            .observation
            .vms
            .iter()
            .zip(accounts)
            .filter(|(_, account)| is_movable(account))
            .collect();
        let claims = movable.iter().map(|(vm, account)| Claim {
            // Memory that is not taken from a VM is not available for others.
            floor: match account.spared {
                None | Some(Spared::Starting) => {
                    vm.settings.floor.min(account.need).max(account.kept)
                }
                Some(_) => account.grant,
            },
            want: account.need,
            weight: vm.settings.weight,
        });
        let claims: Vec<_> = claims.collect();
        let needs = share(for_needs, &claims);
        let claims: Vec<_> = movable
            .iter()
            .zip(&needs)
            .map(|((vm, account), &need)| Claim {
                floor: need,
                want: account.want,
                weight: vm.settings.weight,
            })
            .collect();
        let shares = share(for_wants.max(needs.iter().sum()), &claims);
        fall_back(*capacity, &mut movable);
        for ((vm, account), share) in movable.iter_mut().zip(shares) {
            // Floors hold even if they do not fit, and so does what a VM does not give.
            let floor = vm.settings.floor.min(account.need);
            account.share = share.max(floor).max(account.kept);
        }
    }
}

/// Divides the capacity as if all VMs wanted all of their memory.
fn fall_back(capacity: Pages, movable: &mut [(&Vm, &mut Account)]) {
    let claims = movable.iter().map(|(vm, _)| {
        let want = vm.settings.ceiling.min(vm.memory);
        Claim {
            floor: vm.settings.floor.min(want),
            want,
            weight: vm.settings.weight,
        }
    });
    let claims: Vec<_> = claims.collect();
    let shares = share(capacity, &claims);
    for (((_, account), share), claim) in movable.iter_mut().zip(shares).zip(&claims) {
        // Floors hold even if they do not fit.
        account.fallback = share.max(claim.floor);
    }
}

/// Whether the VM's target may change at all.
const fn is_movable(account: &Account) -> bool {
    !matches!(
        account.spared,
        Some(
            Spared::NoDriver
                | Spared::Frozen
                | Spared::Excluded
                | Spared::OtherController
                | Spared::Refused
        )
    )
}

/// The grant, or what the VM can touch if that is more and it does not give it: the target follows then.
fn reached(vm: &Vm, account: &Account) -> Pages {
    match account.spared {
        Some(Spared::Uncooperative) => account.grant.max(vm.memory.saturating_sub(vm.size)),
        _ => account.grant,
    }
}

/// The smallest change that is worth one when nothing is urgent.
fn least_change(vm: &Vm) -> Pages {
    LEAST_CHANGE.max(vm.memory / 64)
}

/// The reserve of a host that waits for memory is larger.
const fn scaled(reserve: Pages, pressure: HostPressure) -> Pages {
    match pressure {
        HostPressure::None => reserve,
        HostPressure::Some => reserve.saturating_add(reserve / 2),
        HostPressure::Full => reserve.saturating_mul(2),
    }
}
