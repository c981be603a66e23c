// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is known of a VM, and what of it a decision follows at once.

use balloon_policy::{Account, MIB, Pages, Release, Sample, Vm, VmId};

use crate::balloon::Balloon;
use crate::config::{Config, PAGE};
use crate::host::Room;

/// Growth of resident memory between two reports that a decision follows at once.
const GROWTH: Pages = 16 * MIB;

/// What is known of a VM.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) balloon: Balloon,
    pub(crate) resident: Option<Pages>,
    /// The room of the measured pool just before, if the manager cannot look at the resident memory.
    pub(crate) room: Option<Room>,
    pub(crate) sample: Option<Sample>,
    /// The newest order with a known fate.
    pub(crate) answered: u64,
    /// The device answers, and the fate of all orders is known.
    pub(crate) reachable: bool,
}

impl State {
    /// Whether nothing has changed since the old state that a decision should follow at once.
    pub(crate) fn is_at_rest(&self, old: &Self, account: Option<&Account>) -> bool {
        let events = |sample: Sample| (sample.stalls, sample.swapped_in, sample.kills);
        let growth = self
            .resident
            .unwrap_or(0)
            .saturating_sub(old.resident.unwrap_or(0));
        let is_busy = |account| is_busy(self.sample, account, self.balloon.notifies);
        !account.is_some_and(is_busy)
            && old.sample.map(events) == self.sample.map(events)
            && growth < GROWTH
            && (self.answered, self.reachable) == (old.answered, old.reachable)
            && self.balloon.is_same(&old.balloon)
    }

    /// The VM as the policy sees it, or nothing if there is none.
    pub(crate) fn vm(&self, id: VmId, name: &str, config: &Config) -> Option<Vm> {
        let balloon = &self.balloon;
        let all = balloon.memory?;
        let least = all.saturating_sub(balloon.largest.max(balloon.target));
        let least = least.div_ceil(PAGE);
        let memory = all / PAGE;
        let settings = config.settings(name, memory, least);
        let untouchable = settings.is_none();
        let mut settings = settings.or_else(|| Config::default().settings(name, memory, least))?;
        if balloon.is_impossible() {
            // The daemon refuses larger balloons: what the VM gets now could not be taken back.
            settings.ceiling = settings.floor;
        }
        Some(Vm {
            id,
            settings,
            memory,
            target: balloon.target / PAGE,
            size: balloon.size / PAGE,
            resident: self.resident,
            unusable: balloon.unusable / PAGE,
            answered: self.answered,
            granule: (balloon.granule / PAGE).max(1),
            lapsed: balloon.lapsed,
            release: Release {
                offered: balloon.notifies && balloon.release.is_some(),
                left: balloon.release.unwrap_or(0).div_ceil(PAGE),
                used: balloon.released / PAGE,
            },
            driver: balloon.driver,
            frozen: untouchable || balloon.frozen || !self.reachable,
            stopped: balloon.stopped,
            sample: self.sample,
        })
    }
}

/// Whether a guest needs attention: it is short of memory, or may be soon. One that notifies the host of that is left alone
/// until it lacks half of its headroom.
pub(crate) fn is_busy(sample: Option<Sample>, account: &Account, notifies: bool) -> bool {
    let (lacking, available) = match notifies {
        true => (account.headroom / 2, account.headroom / 2),
        false => (0, 2 * account.headroom),
    };
    account.pressed.is_some()
        || account.need > account.grant.saturating_add(lacking)
        || sample.is_some_and(|sample| sample.available < available)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A VM of 4 GiB whose guest reports this total, with a balloon of this size.
    fn state(total: u64, size: u64) -> State {
        let balloon = Balloon {
            memory: Some(4 * GIB),
            unusable: 4 * GIB - total,
            connected: true,
            vmm: None,
            largest: total,
            target: 3 * GIB,
            leased: false,
            claimed: false,
            notifies: false,
            lapsed: false,
            release: None,
            released: 0,
            size,
            resident: None,
            granule: PAGE,
            driver: true,
            frozen: false,
            stopped: None,
        };
        State {
            balloon,
            resident: None,
            room: None,
            sample: None,
            answered: 0,
            reachable: true,
        }
    }

    const fn account(headroom: Pages) -> Account {
        Account {
            vm: VmId(0),
            memory: 4 * GIB / PAGE,
            grant: GIB / PAGE,
            charge: GIB / PAGE,
            used: None,
            headroom,
            kept: 0,
            need: 500 * MIB,
            want: 500 * MIB,
            share: GIB / PAGE,
            fallback: GIB / PAGE,
            spared: None,
            pressed: None,
        }
    }

    const fn sample(available: Pages, stalls: u64) -> Option<Sample> {
        Some(Sample {
            taken: 0,
            free: available,
            available,
            stalls,
            swapped_in: 0,
            kills: 0,
        })
    }

    /// Such a guest has statistics with a small total, and its daemon refuses targets above that.
    #[test]
    fn a_guest_that_reports_little_memory_keeps_what_it_has_and_gets_no_more() {
        let bounds = |total: u64, size| {
            let state = state(total, size);
            let vm = state.vm(VmId(0), "vm", &Config::default()).unwrap();
            (vm.settings.floor * PAGE, vm.settings.ceiling * PAGE)
        };
        assert_eq!(bounds(4 * GIB, 3 * GIB), (GIB / 2, 4 * GIB));
        assert_eq!(bounds(GIB / 16, 3 * GIB), (GIB, GIB));
        // Memory of this one was unplugged, and the balloon is smaller than what it has.
        assert_eq!(bounds(2 * GIB, GIB), (GIB, 4 * GIB));
    }

    #[test]
    fn a_decision_follows_a_change_and_not_each_report() {
        const HEADROOM: Pages = 100 * MIB;
        let account = account(HEADROOM);
        let old = State {
            resident: Some(0),
            sample: sample(500 * MIB, 0),
            ..state(4 * GIB, 3 * GIB)
        };
        let is_at_rest = |change: &dyn Fn(&mut State)| {
            let mut new = old.clone();
            change(&mut new);
            new.is_at_rest(&old, Some(&account))
        };
        assert!(is_at_rest(&|_| {}));
        assert!(is_at_rest(&|new| new.sample = sample(2 * HEADROOM, 0)));
        assert!(is_at_rest(&|new| new.resident = Some(GROWTH - 1)));
        assert!(is_at_rest(&|new| new.balloon.resident = Some(GIB)));
        assert!(!is_at_rest(&|new| new.sample = sample(2 * HEADROOM - 1, 0)));
        assert!(!is_at_rest(&|new| new.sample = sample(500 * MIB, 1)));
        assert!(!is_at_rest(&|new| new.resident = Some(GROWTH)));
        assert!(!is_at_rest(&|new| new.balloon.size -= PAGE));
        assert!(!is_at_rest(&|new| new.answered = 1));
        assert!(!is_at_rest(&|new| new.reachable = false));
        let hungry = Account {
            need: account.grant + 1,
            ..account
        };
        assert!(!old.is_at_rest(&old, Some(&hungry)));
        // No VM is connected.
        assert!(old.is_at_rest(&old, None));
    }

    #[test]
    fn a_guest_that_sends_notices_is_left_alone_for_longer() {
        const HEADROOM: Pages = 100 * MIB;
        let account = account(HEADROOM);
        let available = |pages| sample(pages, 0);
        assert!(is_busy(available(2 * HEADROOM - 1), &account, false));
        assert!(!is_busy(available(HEADROOM / 2), &account, true));
        assert!(is_busy(available(HEADROOM / 2 - 1), &account, true));
        let lacks = |pages| Account {
            need: account.grant + pages,
            ..account
        };
        assert!(is_busy(None, &lacks(1), false));
        assert!(!is_busy(None, &lacks(HEADROOM / 2), true));
        assert!(is_busy(None, &lacks(HEADROOM / 2 + 1), true));
    }
}
