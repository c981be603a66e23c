// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules for Xen: squeezed, and qmemman of Qubes.

use balloon_policy::{MIB, Millis, Pages, Vm};

use super::rule::{Rule, Timer, View, grant, target, thousandths};

/// squeezed: every ten seconds all domains get the same part of what lies between their minimum and maximum.
#[derive(Debug, Default)]
pub(crate) struct Squeezed {
    timer: Timer,
}

const SQUEEZED_INTERVAL: Millis = 10_000;

/// What squeezed leaves free.
const SLUSH: Pages = 9 * MIB;

/// The part, in thousandths, with which domains of these minima and maxima fit.
fn part(bounds: &[(Pages, Pages)], memory: Pages) -> u64 {
    let least: Pages = bounds.iter().map(|(least, _)| least).sum();
    let ranges: Pages = bounds.iter().map(|(least, most)| most - least).sum();
    thousandths(memory.saturating_sub(least), ranges).min(1_000)
}

impl Rule for Squeezed {
    fn name(&self) -> &'static str {
        "squeezed"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), SQUEEZED_INTERVAL) {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        // Domains without a driver keep what they have.
        let fixed: Pages = vms.iter().filter(|vm| !vm.driver).map(|vm| vm.memory).sum();
        let bounds: Vec<_> = vms
            .iter()
            .filter(|vm| vm.driver)
            .map(|vm| (vm.settings.floor, vm.settings.ceiling))
            .collect();
        let memory = view
            .pool()
            .saturating_sub(view.observation.reserve + SLUSH + fixed);
        let part = part(&bounds, memory);
        let sizes = vms.iter().enumerate().filter(|(_, vm)| vm.driver);
        let sizes = sizes.filter_map(|(place, vm)| {
            let range = vm.settings.ceiling - vm.settings.floor;
            let target = target(vm, vm.settings.floor + range / 1_000 * part)?;
            Some((place, target))
        });
        sizes.collect()
    }
}

/// qmemman: a domain prefers 1.3 times what it uses. With enough memory all have more in that proportion; otherwise
/// donors go down to it, and the others share the rest.
#[derive(Debug, Default)]
pub(crate) struct Qmemman {
    timer: Timer,
}

/// Guests report their use once a second.
const QMEMMAN_INTERVAL: Millis = 1_000;

/// What a domain prefers at least.
const LEAST_PREFERRED: Pages = 200 * MIB;

/// What stays free.
const QMEMMAN_FREE: Pages = 50 * MIB;

/// A round moves at least this much, unless a domain is below what it prefers and gains the second number.
const LEAST_TOTAL: Pages = 150 * MIB;
const LEAST_GAIN: Pages = 15 * MIB;

#[derive(Clone, Copy, Debug)]
struct Domain {
    place: usize,
    used: Pages,
    actual: Pages,
    most: Pages,
}

impl Domain {
    fn preferred(&self) -> Pages {
        (self.used * 13 / 10).min(self.most).max(LEAST_PREFERRED)
    }
}

/// The sizes of all domains when `free` is to be divided.
fn balance(domains: &[Domain], free: Pages) -> Vec<Pages> {
    let sum = |pages: &mut dyn Iterator<Item = Pages>| pages.sum::<Pages>();
    let preferred = sum(&mut domains.iter().map(Domain::preferred));
    let actual = sum(&mut domains.iter().map(|domain| domain.actual));
    let safe = |pages: u128| Pages::try_from(pages * 999 / 1_000).unwrap_or(Pages::MAX);
    if free + actual > preferred {
        let whole = u128::from(free + actual);
        let part =
            |domain: &Domain| safe(whole * u128::from(domain.preferred()) / u128::from(preferred));
        let mut sizes: Vec<_> = domains
            .iter()
            .map(|domain| part(domain).min(domain.most))
            .collect();
        // What is beyond the maximum of some is for the others.
        loop {
            let left = safe(whole).saturating_sub(sum(&mut sizes.iter().copied()));
            let open = domains
                .iter()
                .zip(&sizes)
                .filter(|(domain, size)| **size < domain.most);
            let bonus = left.checked_div(open.count() as u64).unwrap_or(0);
            if bonus < MIB {
                return sizes;
            }
            for (size, domain) in sizes.iter_mut().zip(domains) {
                *size = (*size + bonus).min(domain.most);
            }
        }
    }
    let is_donor = |domain: &Domain| domain.preferred() < domain.actual;
    let (donors, acceptors): (Vec<&Domain>, Vec<&Domain>) =
        domains.iter().partition(|domain| is_donor(domain));
    let spare = donors
        .iter()
        .map(|domain| domain.actual - domain.preferred());
    let spare = free + spare.sum::<Pages>();
    let wished = acceptors.iter().map(|domain| domain.preferred());
    let wished = u128::from(wished.sum::<Pages>().max(1));
    domains
        .iter()
        .map(|domain| match is_donor(domain) {
            true => domain.preferred(),
            false => {
                let part = u128::from(spare) * u128::from(domain.preferred()) / wished;
                safe(u128::from(domain.actual) + part).min(domain.most)
            }
        })
        .collect()
}

/// Whether a round is worth it.
fn is_worth_it(domains: &[Domain], sizes: &[Pages]) -> bool {
    let both = || domains.iter().zip(sizes);
    let moved: Pages = both()
        .map(|(domain, size)| domain.actual.abs_diff(*size))
        .sum();
    let gains = |(domain, size): (&Domain, &Pages)| {
        domain.actual < domain.preferred() && *size >= domain.actual + LEAST_GAIN
    };
    moved >= LEAST_TOTAL || both().any(gains)
}

impl Rule for Qmemman {
    fn name(&self) -> &'static str {
        "qmemman"
    }

    fn step(&mut self, view: &View) -> Vec<(usize, Pages)> {
        if !self.timer.is_due(view.now(), QMEMMAN_INTERVAL) {
            return Vec::new();
        }
        let vms = &view.observation.vms;
        let domain = |(place, vm): (usize, &Vm)| {
            let usable = vm.memory - vm.size;
            Some(Domain {
                place,
                used: usable.saturating_sub(vm.sample?.available),
                actual: grant(vm).max(usable),
                most: vm.memory,
            })
        };
        let domains: Vec<_> = vms.iter().enumerate().filter_map(domain).collect();
        let usable: Pages = vms
            .iter()
            .map(|vm| grant(vm).max(vm.memory - vm.size))
            .sum();
        let kept = usable + view.observation.reserve + QMEMMAN_FREE;
        let sizes = balance(&domains, view.pool().saturating_sub(kept));
        if !is_worth_it(&domains, &sizes) {
            return Vec::new();
        }
        let changes = domains.iter().zip(sizes);
        let changes = changes
            .filter_map(|(domain, size)| Some((domain.place, target(&vms[domain.place], size)?)));
        changes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(used: Pages, actual: Pages, most: Pages) -> Domain {
        Domain {
            place: 0,
            used: used * MIB,
            actual: actual * MIB,
            most: most * MIB,
        }
    }

    #[test]
    fn squeezed_gives_all_the_same_part() {
        assert_eq!(part(&[(100, 300), (200, 600)], 600), 500);
        assert_eq!(part(&[(100, 300), (200, 600)], 2_000), 1_000);
        assert_eq!(part(&[(100, 300), (200, 600)], 200), 0);
    }

    #[test]
    fn qmemman_divides_enough_memory_in_proportion() {
        let domains = [domain(1_000, 2_000, 8_000), domain(2_000, 3_000, 8_000)];
        // 7,800 MiB in all for 1,300 and 2,600 preferred, without a thousandth.
        let sizes = balance(&domains, 2_800 * MIB);
        assert_eq!(sizes.map_in_mib(), [2_597, 5_194]);
    }

    #[test]
    fn qmemman_takes_from_donors_what_they_do_not_prefer() {
        let domains = [domain(1_000, 3_000, 8_000), domain(4_000, 4_000, 8_000)];
        // 6,500 are preferred; the 1,700 beyond what the first one prefers go to the other.
        let few = [domain(1_000, 3_000, 8_000), domain(5_000, 3_300, 8_000)];
        assert_eq!(balance(&few, 0).map_in_mib(), [1_300, 4_995]);
        assert_eq!(balance(&domains, 0).map_in_mib(), [1_398, 5_594]);
    }

    #[test]
    fn qmemman_respects_maxima_and_minima() {
        let domains = [domain(10, 100, 400), domain(2_000, 3_000, 8_000)];
        let sizes = balance(&domains, 4_000 * MIB).map_in_mib();
        assert_eq!(sizes[0], 400);
        assert!(sizes[1] > 6_600);
        assert_eq!(domain(10, 100, 400).preferred(), LEAST_PREFERRED);
    }

    #[test]
    fn qmemman_does_nothing_for_little() {
        let domains = [domain(1_000, 1_300, 8_000)];
        assert!(!is_worth_it(&domains, &[1_400 * MIB]));
        assert!(is_worth_it(&domains, &[1_450 * MIB]));
        assert!(is_worth_it(&[domain(1_000, 1_200, 8_000)], &[1_215 * MIB]));
    }

    trait InMib {
        fn map_in_mib(&self) -> Vec<Pages>;
    }

    impl InMib for Vec<Pages> {
        fn map_in_mib(&self) -> Vec<Pages> {
            self.iter().map(|pages| pages / MIB).collect()
        }
    }
}
