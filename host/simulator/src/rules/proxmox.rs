// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Proxmox VE: every ten seconds the use of the host's memory is moved towards 80 %.

use balloon_policy::{Millis, Pages, Vm};

use super::rule::{Rule, Timer, View, grant, target};

const INTERVAL: Millis = 10_000;

/// The goal for the use of the host's memory, in percent.
const GOAL: i64 = 80;

/// Pages of a MiB.
const MIB: i64 = 256;

/// Smaller goals are ignored.
const TOLERANCE: i64 = 10 * MIB;

/// The most that one VM gets or gives at a time.
const STEP: i64 = 100 * MIB;

/// A VM as the rule sees it.
#[derive(Clone, Copy, Debug)]
struct Member {
    place: usize,
    least: i64,
    most: i64,
    shares: i64,
    balloon: i64,
    free: i64,
}

impl Member {
    fn is_pressed(&self) -> bool {
        self.free * 4 <= self.least || self.balloon < self.least
    }
}

#[derive(Debug, Default)]
pub(crate) struct Proxmox {
    timer: Timer,
}

impl Rule for Proxmox {
    fn name(&self) -> &'static str {
        "Proxmox"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), INTERVAL) {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        let members: Vec<_> = vms.iter().enumerate().filter_map(member).collect();
        let goal = signed(view.pool()) / 100 * GOAL - signed(view.resident());
        let sizes = compute(&members, goal);
        let targets = sizes.into_iter().filter_map(|(place, size)| {
            let target = target(&vms[place], Pages::try_from(size).ok()?)?;
            Some((place, target))
        });
        targets.collect()
    }
}

/// VMs without a working balloon do not take part.
fn member((place, vm): (usize, &Vm)) -> Option<Member> {
    vm.driver.then(|| Member {
        place,
        least: signed(vm.settings.floor),
        most: signed(vm.memory),
        shares: i64::from(vm.settings.weight),
        balloon: signed(grant(vm)),
        free: vm.sample.map_or(0, |sample| signed(sample.free)),
    })
}

fn signed(pages: Pages) -> i64 {
    i64::try_from(pages).unwrap_or(i64::MAX)
}

/// The new sizes of those that change, by their place.
fn compute(members: &[Member], goal: i64) -> Vec<(usize, i64)> {
    let mut sizes: Vec<_> = members.iter().map(|member| member.balloon).collect();
    if goal.abs() > TOLERANCE {
        // Growth is for those under pressure, and the others shrink, if that has any effect.
        let preferred: Vec<_> = (0..members.len())
            .filter(|&index| members[index].is_pressed() == (goal > 0))
            .collect();
        let rest = change(members, &mut sizes, &preferred, goal);
        if rest == goal {
            let everyone: Vec<_> = (0..members.len()).collect();
            change(members, &mut sizes, &everyone, goal);
        }
    }
    let changed = members.iter().zip(sizes);
    changed
        .filter(|(member, size)| member.balloon != *size)
        .map(|(member, size)| (member.place, size))
        .collect()
}

/// Divides what the chosen members have above their minimum, and `goal` in addition, by their shares. Returns what is
/// left of the goal.
fn change(members: &[Member], sizes: &mut [i64], chosen: &[usize], goal: i64) -> i64 {
    let mut rest = goal;
    let mut done = vec![false; members.len()];
    loop {
        let open: Vec<_> = chosen
            .iter()
            .copied()
            .filter(|&index| !done[index])
            .collect();
        let shares: i64 = open.iter().map(|&index| members[index].shares).sum();
        let spare: i64 = open
            .iter()
            .map(|&index| sizes[index] - members[index].least)
            .sum();
        let spare = i128::from(spare + rest);
        let mut moved = 0;
        for &index in &open {
            let member = &members[index];
            let part = spare * i128::from(member.shares) / i128::from(shares.max(1));
            let desired = i64::try_from(i128::from(member.least) + part).unwrap_or(i64::MAX);
            let desired = desired.clamp(member.least, member.most);
            let size = match desired > member.balloon {
                true if goal > 0 => desired.min(member.balloon + STEP),
                false if desired < member.balloon => desired.max(member.balloon - STEP),
                _ => {
                    done[index] = true;
                    continue;
                }
            };
            moved += size - sizes[index];
            sizes[index] = size;
        }
        rest -= moved;
        if rest == 0 || moved == 0 {
            return rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(place: usize, [most, shares, balloon, least, free]: [i64; 5]) -> Member {
        Member {
            place,
            least: least * MIB,
            most: most * MIB,
            shares,
            balloon: balloon * MIB,
            free: free * MIB,
        }
    }

    fn sizes(members: &[Member], goal: i64) -> Vec<(usize, i64)> {
        let sizes = compute(members, goal * MIB).into_iter();
        sizes.map(|(place, size)| (place, size / MIB)).collect()
    }

    /// Repeats the rule until it has no effect.
    fn simulate(mut members: Vec<Member>, goal: i64) -> (Vec<Member>, Vec<i64>) {
        let mut rest = goal * MIB;
        loop {
            let changes = compute(&members, rest);
            if changes.is_empty() {
                let sizes = members.iter().map(|member| member.balloon / MIB).collect();
                return (members, sizes);
            }
            for (place, size) in changes {
                let difference = size - members[place].balloon;
                members[place].balloon = size;
                members[place].free = (members[place].free + difference).max(0);
                rest -= difference;
            }
        }
    }

    // The cases of Proxmox' test/balloontest.pl.

    #[test]
    fn growth_is_divided_by_shares() {
        let two = [
            member(0, [2000, 2000, 1000, 1000, 0]),
            member(1, [2000, 1000, 1000, 1000, 0]),
        ];
        assert_eq!(sizes(&two, 0), []);
        assert_eq!(sizes(&two, 90), [(0, 1060), (1, 1030)]);
        assert_eq!(sizes(&two, 150), [(0, 1100), (1, 1050)]);
        assert_eq!(sizes(&two, 270), [(0, 1100), (1, 1090)]);
        for (goal, expected) in [
            (180, [1120, 1060]),
            (270, [1180, 1090]),
            (600, [1300, 1300]),
            (900, [1600, 1300]),
        ] {
            assert_eq!(simulate(two.to_vec(), goal).1, expected, "{goal}");
        }
    }

    #[test]
    fn a_vm_at_its_maximum_leaves_its_part_to_others() {
        let two = [
            member(0, [2000, 2000, 2000, 2000, 0]),
            member(1, [2000, 1000, 1000, 1000, 0]),
        ];
        assert_eq!(sizes(&two, 0), []);
        assert_eq!(sizes(&two, 18), [(1, 1018)]);
        assert_eq!(sizes(&two, 500), [(1, 1100)]);
    }

    #[test]
    fn pressed_vms_grow_first_and_shrink_last() {
        let three = [
            member(0, [2000, 2000, 2000, 2000, 0]),
            member(1, [2000, 1000, 1007, 1000, 0]),
            member(2, [2000, 1000, 1000, 1000, 512]),
        ];
        assert_eq!(sizes(&three, 0), []);
        assert_eq!(sizes(&three, 11), [(1, 1018)]);
        assert_eq!(sizes(&three, 80), [(1, 1087)]);
        assert_eq!(sizes(&three, 200), [(1, 1107)]);
        let (grown, sizes) = simulate(three.to_vec(), 593);
        assert_eq!(sizes, [2000, 1300, 1300]);
        assert_eq!(simulate(grown.clone(), -200).1, [2000, 1200, 1200]);
        assert_eq!(simulate(grown.clone(), -400).1, [2000, 1200, 1000]);
        assert_eq!(simulate(grown, -593).1, [2000, 1007, 1000]);
    }
}
