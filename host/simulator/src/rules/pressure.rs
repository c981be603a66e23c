// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules that follow the pressure on the host, or on a guest: hypeman, the PI controller of qemus, and vm0.

use balloon_policy::{MIB, Millis, Pages};

use super::rule::{Rule, Timer, View, grant, target, thousandths};

/// hypeman: below 10 % of available host memory VMs give in proportion to what they have above their floor, until it
/// is 15 %; then they get it back.
#[derive(Debug, Default)]
pub(crate) struct Hypeman {
    timer: Timer,
    pressed: bool,
    /// When each VM was changed.
    changed: Vec<Option<Millis>>,
}

const HYPEMAN_INTERVAL: Millis = 2_000;

/// Thousandths of the host's memory.
const ENTER: u64 = 100;
const LEAVE: u64 = 150;

/// The smallest change, the largest one, and the time between two of one VM.
const LEAST_CHANGE: Pages = 64 * MIB;
const STEP: Pages = 256 * MIB;
const COOLDOWN: Millis = 5_000;

/// A VM's floor is the larger of this and a half of its memory.
const HYPEMAN_FLOOR: Pages = 512 * MIB;

/// The wanted sizes of VMs of these sizes and floors, when `wanted` is to be reclaimed.
fn reclaim(vms: &[(Pages, Pages)], wanted: Pages) -> Vec<Pages> {
    let headroom = |&(size, floor): &(Pages, Pages)| size.saturating_sub(floor);
    let all: Pages = vms.iter().map(headroom).sum();
    let wanted = wanted.min(all);
    let part = |vm: &(Pages, Pages)| {
        let part = u128::from(wanted) * u128::from(headroom(vm)) / u128::from(all.max(1));
        vm.0 - Pages::try_from(part).unwrap_or(0)
    };
    vms.iter().map(part).collect()
}

impl Rule for Hypeman {
    fn name(&self) -> &'static str {
        "hypeman"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), HYPEMAN_INTERVAL) {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        self.changed.resize(vms.len(), None);
        let free = view.pool().saturating_sub(view.resident());
        let available = thousandths(free, view.pool());
        self.pressed = available < if self.pressed { LEAVE } else { ENTER };
        let wanted = match self.pressed {
            true => (view.pool() / 1_000 * LEAVE).saturating_sub(free),
            false => 0,
        };
        // Without pressure they get all of it back, in steps.
        let sizes = vms.iter().map(|vm| {
            let size = if self.pressed { grant(vm) } else { vm.memory };
            (size, (vm.memory / 2).max(HYPEMAN_FLOOR).min(vm.memory))
        });
        let sizes = reclaim(&sizes.collect::<Vec<_>>(), wanted);
        let mut targets = Vec::new();
        for (place, (vm, size)) in vms.iter().zip(sizes).enumerate() {
            let now = grant(vm);
            let size = size.clamp(now.saturating_sub(STEP), now + STEP);
            let rests = self.changed[place].is_some_and(|time| view.now() - time < COOLDOWN);
            if !vm.driver || rests || (size.abs_diff(now) < LEAST_CHANGE && size != vm.memory) {
                continue;
            }
            if let Some(target) = target(vm, size) {
                self.changed[place] = Some(view.now());
                targets.push((place, target));
            }
        }
        targets
    }
}

/// The PI controller of qemus: one for each VM, on the use of the host's memory.
#[derive(Debug, Default)]
pub(crate) struct Controller {
    timer: Timer,
    /// The integral of each VM's controller, in thousandths times seconds.
    integrals: Vec<i64>,
}

const CONTROLLER_SECONDS: i64 = 5;

/// The use of the host's memory that it aims at, and above which guests may have less than they use, in thousandths.
const SETPOINT: i64 = 800;
const HARD: i64 = 900;

/// The factors of the error and of its integral, in thousandths.
const PROPORTIONAL: i64 = 500;
const INTEGRAL: i64 = 50;

/// The largest part of a VM's memory that it takes, in thousandths.
const MOST: i64 = 670;

/// Smaller changes are dropped.
const HYSTERESIS: Pages = 128 * MIB;

/// The part of the memory that is taken at this use of the host, in thousandths. What the output cannot follow does
/// not wind the integral up.
fn control(integral: &mut i64, used: i64) -> i64 {
    let error = used - SETPOINT;
    *integral += error * CONTROLLER_SECONDS;
    let output = (PROPORTIONAL * error + INTEGRAL * *integral) / 1_000;
    let possible = output.clamp(0, MOST);
    *integral += (possible - output) * 1_000 / INTEGRAL;
    possible
}

impl Rule for Controller {
    fn name(&self) -> &'static str {
        "PI controller"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self
            .timer
            .is_due(view.now(), CONTROLLER_SECONDS.unsigned_abs() * 1_000)
        {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        self.integrals.resize(vms.len(), 0);
        let used = thousandths(view.resident(), view.pool());
        let used = i64::try_from(used).unwrap_or(i64::MAX).min(10_000);
        let mut targets = Vec::new();
        for (place, (vm, integral)) in vms.iter().zip(&mut self.integrals).enumerate() {
            let part = control(integral, used).unsigned_abs();
            let mut size = vm.memory - vm.memory / 1_000 * part;
            if let Some(sample) = vm.sample.filter(|_| used < HARD) {
                size = size.max((vm.memory - vm.size).saturating_sub(sample.available));
            }
            if size.abs_diff(grant(vm)) >= HYSTERESIS {
                targets.extend(target(vm, size).map(|target| (place, target)));
            }
        }
        targets
    }
}

/// vm0: every five seconds a guest gives what it has free, and gets everything when hardly anything is available.
#[derive(Debug, Default)]
pub(crate) struct Vm0 {
    timer: Timer,
}

const VM0_INTERVAL: Millis = 5_000;

/// Free memory that a guest keeps, and available memory below which it gets everything.
const VM0_FREE: Pages = 384 * MIB;
const VM0_PRESSED: Pages = 192 * MIB;

/// What a guest keeps in any case.
const VM0_FLOOR: Pages = 1_024 * MIB;

/// The size of the balloon after a tick.
fn inflate(memory: Pages, target: Pages, actual: Pages, free: Pages, available: Pages) -> Pages {
    if available < VM0_PRESSED {
        return 0;
    }
    if free <= VM0_FREE {
        return target;
    }
    let step = (free - VM0_FREE).min(STEP);
    (target.max(actual) + step)
        .min(memory.saturating_sub(VM0_FLOOR))
        .max(target)
}

impl Rule for Vm0 {
    fn name(&self) -> &'static str {
        "vm0"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), VM0_INTERVAL) {
            return Vec::new();
        }
        let vms = view.observation.vms.iter().enumerate();
        let targets = vms.filter_map(|(place, vm)| {
            let sample = vm.sample?;
            let target = inflate(vm.memory, vm.target, vm.size, sample.free, sample.available);
            (target != vm.target).then_some((place, target))
        });
        targets.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypeman_takes_in_proportion_to_the_headroom() {
        assert_eq!(reclaim(&[(400, 100), (200, 100)], 100), [325, 175]);
        assert_eq!(reclaim(&[(400, 100), (200, 100)], 1_000), [100, 100]);
        assert_eq!(reclaim(&[(400, 100), (50, 100)], 100), [300, 50]);
    }

    #[test]
    fn the_controller_takes_more_while_the_host_is_too_full() {
        let mut integral = 0;
        // 100 over the goal: 50 for the error, and 25 for each five seconds of it.
        assert_eq!(control(&mut integral, 900), 75);
        assert_eq!(control(&mut integral, 900), 100);
        assert_eq!(control(&mut integral, 800), 50);
        // On an empty host it gives all, and its integral does not wind up.
        for _ in 0..100 {
            assert_eq!(control(&mut integral, 500), 0);
        }
        assert!(control(&mut integral, 900) > 0);
    }

    #[test]
    fn vm0_inflates_in_steps_and_releases_all() {
        let inflate = |target, actual, free, available| {
            inflate(
                4_096 * MIB,
                target * MIB,
                actual * MIB,
                free * MIB,
                available * MIB,
            ) / MIB
        };
        assert_eq!(inflate(0, 0, 2_000, 2_000), 256);
        assert_eq!(inflate(256, 100, 500, 500), 372);
        assert_eq!(inflate(3_000, 3_000, 600, 600), 3_072);
        assert_eq!(inflate(1_000, 1_000, 384, 384), 1_000);
        assert_eq!(inflate(1_000, 1_000, 50, 191), 0);
    }
}
