// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The policy's state of a VM.

use crate::estimate::Estimate;
use crate::observation::{
    Account, Action, Cause, MIB, Millis, Pages, Pressure, Sample, Spared, Stopped, Vm,
};
use crate::progress::{PATIENCE, Progress};

/// Statistics older than this say nothing about the guest's present state.
const STALE_AFTER: Millis = 2_500;

/// For how long a sign of pressure counts.
const PRESSED_FOR: Millis = 2_000;

/// For how long the death of a process counts: a restarted process needs the same memory again.
const OOM_FOR: Millis = 300_000;

/// The least that a guest under pressure gets at once.
const LEAST_RAISE: Pages = 256 * MIB;

/// The most that it gets at once, unless it uses more.
const MOST_RAISE: Pages = 1024 * MIB;

/// For how long a new VM keeps memory that no other VM waits for.
const GRACE: Millis = 30_000;

/// For how long the policy sets no target after the device has refused one.
const REFUSED_FOR: Millis = 10_000;

/// For how long the policy leaves a VM alone after another program has changed its target.
const LEFT_ALONE: Millis = 600_000;

/// Growth at which a VM without much untouched memory left is under pressure, in pages a second.
const FAST_GROWTH: Pages = 640 * MIB;

/// Resident memory is read at least this often. With other VMs there may be several observations between two readings.
const READING: Millis = 1_000;

/// For how long the policy expects a driver that does not work back: the VM may be paused for a moment.
const PAUSE: Millis = 2_000;

/// How long a VM may take to give what it was asked for, until others are asked for it, and until a guest in need gets
/// small parts of it.
pub(crate) const GIVING: Millis = 1_000;

/// An action that was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    target: Pages,
    /// The target that it replaces.
    before: Pages,
    /// By how much the device may lower the target by itself.
    release: Pages,
}

impl Sent {
    /// The smallest target that may be in force because of it.
    const fn least(&self) -> Pages {
        self.target.saturating_sub(self.release)
    }
}

/// The previous observation.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Millis,
    target: Pages,
    size: Pages,
    resident: Option<Pages>,
    /// Since when that is the resident memory.
    resident_since: Millis,
    stopped: Option<Stopped>,
    sample: Option<Sample>,
}

/// A sign of pressure.
#[derive(Clone, Copy, Debug)]
struct Pressed {
    at: Millis,
    sign: Pressure,
    raise: Raise,
}

/// The grant for a VM.
#[derive(Clone, Copy, Debug)]
struct Raise {
    /// In all.
    usable: Pages,
    /// How much more that is than what it had.
    by: Pages,
}

#[derive(Debug)]
pub(crate) struct Tracker {
    since: Millis,
    /// The previous observation of a working driver.
    seen: Option<Seen>,
    /// Since when the driver does not work.
    away: Option<Millis>,
    /// Since when the balloon has had its size.
    settled: Millis,
    /// Actions that may or may not have been carried out.
    sent: Vec<Sent>,
    /// The target that the device should have.
    expected: Option<Pages>,
    estimate: Option<Estimate>,
    pressed: Option<Pressed>,
    /// When a process died, and what the guest would have needed.
    killed: Option<(Millis, Raise)>,
    /// When a target was sent the last time.
    moved: Option<Millis>,
    progress: Progress,
    refused_until: Millis,
    left_alone_until: Millis,
}

impl Tracker {
    pub(crate) fn new(now: Millis) -> Self {
        Self {
            since: now,
            seen: None,
            away: None,
            settled: now,
            sent: Vec::new(),
            expected: None,
            estimate: None,
            pressed: None,
            killed: None,
            moved: None,
            progress: Progress::default(),
            refused_until: 0,
            left_alone_until: 0,
        }
    }

    /// Updates the state from an observation.
    pub(crate) fn observe(&mut self, vm: &Vm, now: Millis, peak_half_life: Millis) {
        self.settle_actions(vm, now);
        if !self.continues(vm, now) {
            // Another guest may come, with other statistics.
            *self = Self {
                sent: std::mem::take(&mut self.sent),
                expected: self.expected,
                away: self.away,
                ..Self::new(now)
            };
        }
        if !vm.driver {
            return;
        }
        let same = self.seen.filter(|last| last.resident == vm.resident);
        let last = self.seen.replace(Seen {
            at: now,
            target: vm.target,
            size: vm.size,
            resident: vm.resident,
            resident_since: same.map_or(now, |last| last.resident_since),
            stopped: vm.stopped,
            sample: vm.sample,
        });
        if last.is_none_or(|last| last.size != vm.size) {
            self.settled = now;
        }
        if vm.sample.is_some_and(|sample| sample.taken >= self.settled) {
            self.estimate = Estimate::update(self.estimate, vm, peak_half_life);
        }
        if let Some(last) = last {
            if let Some(sign) = self.sign(vm, &last, now) {
                self.press(sign, vm, now);
            }
        }
        let headroom = self.headroom(vm);
        self.progress.watch(vm, now, self.settled, headroom);
    }

    /// Whether the driver is the one of the previous observation, or may be. A new one has an empty balloon.
    fn continues(&mut self, vm: &Vm, now: Millis) -> bool {
        if vm.driver {
            let is_emptied = vm.size == 0 && self.seen.is_some_and(|seen| seen.size > 0);
            return self.away.take().is_none() || !is_emptied;
        }
        let away = *self.away.get_or_insert(now);
        now.saturating_sub(away) < PAUSE
    }

    /// Updates the state of sent actions.
    fn settle_actions(&mut self, vm: &Vm, now: Millis) {
        let sent = std::mem::take(&mut self.sent).into_iter();
        let (answered, open): (Vec<_>, _) = sent.partition(|sent| sent.number <= vm.answered);
        self.sent = open;
        if let Some(sent) = answered.last() {
            self.expected = Some(sent.target);
        }
        if !self.sent.is_empty() {
            return;
        }
        // What was set last, if the device has released some of it.
        let set = vm.target.saturating_add(vm.release.used);
        let is_set = |target: Pages| target == vm.target || target == set;
        if self.expected.is_some_and(|expected| !is_set(expected)) {
            if answered.iter().any(|sent| is_set(sent.before)) {
                self.refused_until = now + REFUSED_FOR;
            } else if !vm.lapsed {
                self.left_alone_until = now + LEFT_ALONE;
            }
        }
        self.expected = Some(vm.target);
    }

    /// Whether the VM shows a new sign of pressure.
    fn sign(&self, vm: &Vm, last: &Seen, now: Millis) -> Option<Pressure> {
        let new = vm.sample.filter(|new| {
            last.sample.is_none_or(|old| new.taken > old.taken)
                && now.saturating_sub(new.taken) <= STALE_AFTER
        });
        let headroom = self.headroom(vm);
        let is_low = |sample: Sample, part: u64| sample.available < headroom / part;
        let low = |part: u64| new.is_some_and(|new| is_low(new, part));
        // Counters that went back are those of another boot.
        let more = |counter: fn(&Sample) -> u64| {
            let old = last.sample.map(|sample| counter(&sample))?;
            new.map(|new| counter(&new))?.checked_sub(old)
        };
        let grew = |counter, by| more(counter).is_some_and(|more| more > by);
        // A limit of a container kills processes as well, and memory is low before the kill, not after it.
        let was_low = low(1) || last.sample.is_some_and(|old| is_low(old, 1));
        if grew(|sample| sample.kills, 0) && was_low {
            return Some(Pressure::Oom);
        }
        // A driver that deflates for an allocation that fails has kept the process.
        let after_oom = vm.stopped == Some(Stopped::AfterOom) && last.stopped != vm.stopped;
        // The balloon of a VM that is left alone may count as empty. After a larger target it may have shrunk to the
        // one before.
        let is_asked = self.sent.is_empty() && !vm.frozen && vm.target <= last.target;
        let shrank = vm.size < last.size && vm.size < vm.target && is_asked;
        if after_oom || shrank {
            return Some(Pressure::SelfDeflated);
        }
        // The next sign counts when the effect of the last raise shows.
        let waits = self.pressed.is_some_and(|pressed| {
            now.saturating_sub(pressed.at) <= PRESSED_FOR
                && (!self.sent.is_empty() || self.settled > new.map_or(0, |new| new.taken))
        });
        let usable = vm.memory.saturating_sub(vm.size);
        let untouched = vm.touched().map(|touched| usable.saturating_sub(touched));
        // A guest in need has touched its memory.
        if waits || untouched.is_some_and(|untouched| untouched >= headroom / 2) {
            return None;
        }
        if low(4) {
            return Some(Pressure::LowAvailable);
        }
        // An inflating balloon causes stalls itself.
        let still = now.saturating_sub(self.settled) > PATIENCE / 4;
        let inflating = (vm.target > vm.size && !still) || !self.sent.is_empty();
        if !inflating {
            if grew(|sample| sample.stalls, 0) {
                return Some(Pressure::Stalls);
            }
            if grew(|sample| sample.swapped_in, MIB) {
                return Some(Pressure::SwapIn);
            }
        }
        self.grows(vm, last, now)?.then_some(Pressure::Growth)
    }

    /// Whether resident memory grows fast, or without statistics, if it is known.
    fn grows(&self, vm: &Vm, last: &Seen, now: Millis) -> Option<bool> {
        let growth = vm.resident?.saturating_sub(last.resident?);
        let since = now.saturating_sub(READING);
        let since = since.clamp(last.resident_since, last.at);
        let fast = FAST_GROWTH.saturating_mul(now - since).max(1);
        Some(match self.fresh(vm, now) {
            true => growth.saturating_mul(1_000) >= fast,
            false => growth > 0,
        })
    }

    /// The guest gets more, twice as much as the last time if that was just now.
    fn press(&mut self, sign: Pressure, vm: &Vm, now: Millis) {
        let used = self.estimate.map_or(0, |estimate| estimate.used);
        let first = LEAST_RAISE.max(used / 4);
        // Memory that the VM has not touched yet counts as given.
        let usable = vm.memory.saturating_sub(vm.size.min(self.target(vm)));
        let usable = usable.min(vm.touched().unwrap_or(usable));
        let raise = |by: Pages| Raise {
            usable: usable.saturating_add(by),
            by,
        };
        if sign == Pressure::Oom {
            let again = self.killed(now).map(|killed| killed.by.saturating_mul(2));
            self.killed = Some((now, raise(again.unwrap_or(first).max(first))));
        }
        let again = self
            .pressed
            .filter(|pressed| now.saturating_sub(pressed.at) <= PRESSED_FOR);
        let by = again.map_or(first, |pressed| {
            let doubled = pressed.raise.by.saturating_mul(2);
            doubled.min(MOST_RAISE.max(used)).max(first)
        });
        self.pressed = Some(Pressed {
            at: now,
            sign,
            raise: raise(by),
        });
    }

    /// The memory that the guest would have needed to keep a process that died recently.
    fn killed(&self, now: Millis) -> Option<Raise> {
        let killed = self
            .killed
            .filter(|(at, _)| now.saturating_sub(*at) <= OOM_FOR);
        killed.map(|(_, raise)| raise)
    }

    /// Remembers an action.
    pub(crate) fn send(&mut self, action: &Action, now: Millis) {
        self.moved = Some(now);
        if action.cause == Cause::Contended {
            // Other VMs use now what this one may use again.
            self.estimate = self.estimate.map(Estimate::without_peak);
        }
        self.sent.push(Sent {
            number: action.number,
            target: action.target,
            before: action.before,
            release: action.release,
        });
    }

    /// The target when all actions have been carried out.
    pub(crate) fn target(&self, vm: &Vm) -> Pages {
        self.sent.last().map_or(vm.target, |sent| sent.target)
    }

    /// The present sign of pressure.
    pub(crate) fn pressure(&self, now: Millis) -> Option<Pressure> {
        self.pressed
            .filter(|pressed| now.saturating_sub(pressed.at) <= PRESSED_FOR)
            .map(|pressed| pressed.sign)
    }

    fn fresh(&self, vm: &Vm, now: Millis) -> bool {
        vm.sample
            .is_some_and(|sample| now.saturating_sub(sample.taken) <= STALE_AFTER)
    }

    fn headroom(&self, vm: &Vm) -> Pages {
        let least = Estimate::update(None, vm, 0);
        let estimate = self.estimate.or(least);
        estimate.map_or(LEAST_RAISE, |estimate| estimate.headroom(vm.memory))
    }

    /// Why the policy takes nothing from the VM. `overcommitted` says that the VMs can touch more
    /// than the pool.
    fn spared(&self, vm: &Vm, now: Millis, overcommitted: bool) -> Option<Spared> {
        if !vm.driver {
            Some(Spared::NoDriver)
        } else if vm.frozen {
            Some(Spared::Frozen)
        } else if vm.stopped == Some(Stopped::Excluded) {
            Some(Spared::Excluded)
        } else if now < self.refused_until {
            Some(Spared::Refused)
        } else if now < self.left_alone_until {
            Some(Spared::OtherController)
        } else if self.estimate.is_none() || !self.fresh(vm, now) {
            Some(Spared::NoStatistics)
        } else if self.progress.is_uncooperative(vm, now, self.headroom(vm)) {
            Some(Spared::Uncooperative)
        } else if now.saturating_sub(self.since) < GRACE && !overcommitted {
            Some(Spared::Starting)
        } else {
            None
        }
    }

    /// The memory that the VM can touch until its device reports otherwise.
    pub(crate) fn charge(&self, vm: &Vm) -> Pages {
        match vm.driver {
            true => self.expected_charge(vm),
            false => vm.memory.max(vm.resident.unwrap_or(0)),
        }
    }

    /// The same, once a driver that may be paused works again.
    pub(crate) fn expected_charge(&self, vm: &Vm) -> Pages {
        let sent = self.sent.iter().map(Sent::least);
        let least = vm.target.saturating_sub(vm.release.left);
        let balloon = match self.seen {
            Some(_) => sent.fold(least.min(vm.size), Pages::min),
            None => 0,
        };
        let usable = vm.memory.saturating_sub(balloon);
        usable.max(vm.resident.unwrap_or(0))
    }

    /// Whether a target was sent less than `time` ago.
    pub(crate) fn moved_within(&self, time: Millis, now: Millis) -> bool {
        self.moved
            .is_some_and(|moved| now.saturating_sub(moved) < time)
    }

    /// The memory that the VM was asked for a moment ago, and has not given yet.
    pub(crate) fn coming(&self, vm: &Vm, now: Millis) -> Pages {
        let grant = vm.memory.saturating_sub(self.target(vm));
        match self.moved_within(GIVING, now) {
            true => self.expected_charge(vm).saturating_sub(grant),
            false => 0,
        }
    }

    /// The policy's view of the VM, before the capacity is divided.
    pub(crate) fn account(&self, vm: &Vm, now: Millis, overcommitted: bool) -> Account {
        let spared = self.spared(vm, now, overcommitted);
        let grant = vm.memory.saturating_sub(self.target(vm));
        let headroom = self.headroom(vm);
        let known = self
            .estimate
            .filter(|_| spared != Some(Spared::NoStatistics));
        let mut need = known.map_or(grant, |estimate| estimate.used.saturating_add(headroom / 2));
        if let Some(pressed) = self.pressed.filter(|_| self.pressure(now).is_some()) {
            need = need.max(pressed.raise.usable);
        }
        // Without statistics, only memory that was never touched shows that a guest has enough.
        let occupied = known.map_or(vm.touched().unwrap_or(vm.memory), |known| known.wanted());
        let wanted = match self.pressure(now) {
            // A part of it may not be enough, and then another process dies.
            Some(Pressure::Oom | Pressure::SelfDeflated) => vm.memory,
            // Its balloon may still deflate to the target.
            Some(_) => occupied.saturating_add(headroom).max(grant),
            None => occupied.saturating_add(headroom),
        };
        // The process may start again. Guests that need memory now come first.
        let again = self.killed(now).map_or(0, |killed| killed.usable);
        let ceiling = vm.settings.ceiling.min(vm.memory);
        let floor = vm.settings.floor.min(ceiling);
        let kept = known.map_or(0, |known| self.progress.kept(known.used, now));
        let kept = kept.min(grant).min(ceiling);
        let need = need.max(kept).clamp(floor, ceiling);
        Account {
            vm: vm.id,
            memory: vm.memory,
            grant,
            charge: self.charge(vm),
            used: self.estimate.map(|estimate| estimate.used),
            headroom,
            kept,
            need,
            want: wanted.max(again).clamp(need, ceiling),
            share: grant,
            fallback: grant,
            spared,
            pressed: self.pressure(now),
        }
    }
}
