// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host with guests of all kinds, some of them hostile, and connections that delay and lose messages.

use std::collections::VecDeque;

use balloon_policy::{
    Action, Decision, GIB, HostPressure, MIB, Millis, Observation, Pages, Policy, Profile, Release,
    Sample, Settings, Stopped, Vm, VmId,
};
use fastrand::Rng;

/// How a guest behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// It inflates and deflates at once, and its statistics are true.
    Honest,
    /// It inflates slowly.
    Slow,
    /// It never inflates.
    Stuck,
    /// It has no statistics.
    Silent,
    /// It reports that it needs memory, whatever it has.
    Greedy,
    /// Its statistics are random.
    Random,
    /// It touches all of its memory, in the balloon or not.
    Trespassing,
    /// The same, and it reports that it has hardly any memory. Its daemon refuses a larger balloon.
    Tiny,
}

pub(crate) const BEHAVIOURS: [Behaviour; 8] = [
    Behaviour::Honest,
    Behaviour::Slow,
    Behaviour::Stuck,
    Behaviour::Silent,
    Behaviour::Greedy,
    Behaviour::Random,
    Behaviour::Trespassing,
    Behaviour::Tiny,
];

/// What a guest has that reports hardly any memory.
const TINY: Pages = 64 * MIB;

#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) behaviour: Behaviour,
    pub(crate) settings: Settings,
    pub(crate) memory: Pages,
    pub(crate) granule: Pages,
    pub(crate) used: Pages,
    /// What its driver keeps available.
    pub(crate) kept: Pages,
    pub(crate) target: Pages,
    pub(crate) size: Pages,
    pub(crate) frozen: bool,
    pub(crate) release: Release,
    stalls: u64,
    answered: u64,
    /// Messages in flight, and their arrival times. A message without a time is lost.
    messages: VecDeque<(Option<Millis>, Action)>,
}

impl Guest {
    pub(crate) fn new(behaviour: Behaviour, memory: Pages, used: Pages, target: Pages) -> Self {
        let settings = Settings {
            floor: memory / 8,
            ceiling: memory,
            weight: 1000,
        };
        Self {
            behaviour,
            settings,
            memory,
            granule: 1,
            used,
            kept: 0,
            target,
            size: target,
            frozen: false,
            release: Release::NONE,
            stalls: 0,
            answered: 0,
            messages: VecDeque::new(),
        }
    }

    /// The memory that it can touch or has touched, now, or when its device has released what it may.
    pub(crate) fn reachable(&self) -> Pages {
        let usable = self.memory - (self.target - self.release.left).min(self.size);
        usable.max(self.resident().unwrap_or(0))
    }

    /// The memory that the host has given, as far as that matters.
    fn resident(&self) -> Option<Pages> {
        let touches_all = matches!(self.behaviour, Behaviour::Trespassing | Behaviour::Tiny);
        touches_all.then_some(self.memory)
    }

    pub(crate) fn grant(&self) -> Pages {
        self.memory - self.target
    }

    fn receive(&mut self, now: Millis) {
        while let Some((time, action)) = self.messages.front().copied() {
            if time.is_some_and(|time| time > now) {
                break;
            }
            self.messages.pop_front();
            let refused = self.behaviour == Behaviour::Tiny && action.target > self.target;
            if time.is_some() && !refused {
                self.target = action.target;
                (self.release.left, self.release.used) = (action.release, 0);
            }
            self.answered = action.number;
        }
    }

    /// The device lowers its target by itself.
    pub(crate) fn notice(&mut self) {
        let pages = std::mem::take(&mut self.release.left);
        self.release.used += pages;
        self.target -= pages;
    }

    /// Moves the balloon.
    fn work(&mut self, time: Millis) {
        if self.target < self.size {
            self.size = self.target;
            return;
        }
        let speed = match self.behaviour {
            Behaviour::Stuck => 0,
            Behaviour::Slow => 40 * MIB * time / 1_000,
            _ => Pages::MAX,
        };
        // It does not inflate memory in use.
        let possible = self.memory.saturating_sub(self.used + self.kept);
        let possible = possible.max(self.size);
        let size = self
            .target
            .min(self.size.saturating_add(speed))
            .min(possible);
        self.size = size.max(self.size);
    }

    fn sample(&mut self, now: Millis, rng: &mut Rng) -> Option<Sample> {
        let usable = self.memory - self.size;
        let available = usable.saturating_sub(self.used);
        let missing = self.used.saturating_sub(usable);
        self.stalls += u64::from(missing > 0 || self.behaviour == Behaviour::Greedy);
        let honest = Sample {
            taken: now,
            free: available,
            available,
            stalls: self.stalls,
            swapped_in: 0,
            kills: 0,
        };
        match self.behaviour {
            Behaviour::Silent => None,
            Behaviour::Greedy => Some(Sample {
                free: 0,
                available: 0,
                ..honest
            }),
            Behaviour::Random => Some(Sample {
                taken: rng.u64(now.saturating_sub(3_000)..=now + 1_000),
                free: self.random(rng),
                available: self.random(rng),
                stalls: rng.u64(..3),
                swapped_in: rng.u64(..4 * MIB),
                kills: rng.u64(..3),
            }),
            Behaviour::Tiny => Some(Sample {
                free: honest.free.min(TINY),
                available: honest.available.min(TINY),
                ..honest
            }),
            _ => Some(honest),
        }
    }

    /// A number of pages that a guest can report: hardly any, a part of its memory, or more than it has.
    fn random(&self, rng: &mut Rng) -> Pages {
        match rng.u32(..3) {
            0 => rng.u64(..256 * MIB),
            1 => rng.u64(..self.memory),
            _ => rng.u64(..),
        }
    }

    fn observe(&mut self, id: u32, now: Millis, rng: &mut Rng) -> Vm {
        let mut settings = self.settings;
        if self.behaviour == Behaviour::Tiny && self.target > 0 {
            // What it gets now cannot be taken back.
            settings.floor = settings.floor.max(self.grant()).min(settings.ceiling);
            settings.ceiling = settings.floor;
        }
        let stops = match self.behaviour {
            Behaviour::Random => rng.bool(),
            _ => self.kept > 0,
        };
        Vm {
            size: self.size,
            resident: self.resident(),
            unusable: match self.behaviour {
                Behaviour::Tiny => self.memory.saturating_sub(TINY),
                Behaviour::Random => self.random(rng),
                _ => 0,
            },
            answered: self.answered,
            granule: self.granule,
            release: self.release,
            frozen: self.frozen,
            stopped: (self.size < self.target && stops).then_some(Stopped::Full),
            sample: self.sample(now, rng),
            ..Vm::new(VmId(id), settings, self.memory, self.target)
        }
    }
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) now: Millis,
    pub(crate) pool: Pages,
    pub(crate) reserve: Pages,
    pub(crate) pressure: HostPressure,
    pub(crate) guests: Vec<Guest>,
    pub(crate) policy: Policy,
    /// Messages take up to this long.
    pub(crate) delay: Millis,
    /// One message in so many is lost; 0 is none.
    pub(crate) losses: u32,
    /// Observations are up to this old.
    pub(crate) lag: usize,
    recent: VecDeque<Vec<Vm>>,
}

impl World {
    pub(crate) fn new(seed: u64, pool: Pages, guests: Vec<Guest>) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            now: 1_000,
            pool,
            reserve: 0,
            pressure: HostPressure::None,
            guests,
            policy: Policy::new(Profile::Density),
            delay: 0,
            losses: 0,
            lag: 0,
            recent: VecDeque::new(),
        }
    }

    /// A host of `count` guests that fit it when it begins, with all behaviours and bad connections.
    pub(crate) fn hostile(seed: u64, count: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let guests: Vec<_> = (0..count)
            .map(|_| {
                let memory = rng.u64(1..=8) * GIB;
                let used = rng.u64(0..=memory);
                let behaviour = BEHAVIOURS[rng.usize(..BEHAVIOURS.len())];
                let granule = [1, 16, 512][rng.usize(..3)];
                let target = rng.u64(0..=memory / 2) / granule * granule;
                let mut guest = Guest::new(behaviour, memory, used, target);
                guest.granule = granule;
                guest.settings.floor = memory / rng.u64(4..=16);
                guest.settings.ceiling = memory - rng.u64(0..=memory / 4);
                guest.settings.weight = rng.u16(..);
                guest.release.offered = rng.bool();
                guest.kept = rng.u64(0..=1) * rng.u64(0..=GIB);
                guest
            })
            .collect();
        let taken: Pages = guests.iter().map(Guest::reachable).sum();
        let reserve = rng.u64(0..=GIB);
        let mut world = Self::new(rng.u64(..), taken + reserve + rng.u64(0..=4 * GIB), guests);
        world.reserve = reserve;
        world.delay = rng.u64(0..=3_000);
        world.losses = rng.u32(0..=8);
        world.lag = rng.usize(0..=4);
        world
    }

    pub(crate) fn limit(&self) -> Pages {
        self.pool - self.reserve
    }

    /// The memory that all guests can touch, now or after messages in flight.
    pub(crate) fn reachable(&self) -> Pages {
        self.guests.iter().map(Guest::reachable).sum()
    }

    pub(crate) fn observe(&mut self) -> Observation {
        let (now, rng) = (self.now, &mut self.rng);
        let ids = 0..;
        let vms = self.guests.iter_mut().zip(ids);
        let vms = vms.map(|(guest, id)| guest.observe(id, now, rng)).collect();
        self.recent.push_front(vms);
        self.recent.truncate(self.lag + 1);
        // Each VM is observed on its own, and never twice in the wrong order.
        let vms = self.recent[self.recent.len() - 1].clone();
        Observation {
            now,
            pool: self.pool,
            reserve: self.reserve,
            pressure: self.pressure,
            reservations: Vec::new(),
            vms,
        }
    }

    /// Advances the time, and runs a step of the policy.
    pub(crate) fn step(&mut self, time: Millis) -> (Observation, Decision) {
        self.now += time;
        for guest in &mut self.guests {
            guest.receive(self.now);
            guest.work(time);
        }
        let observation = self.observe();
        let decision = self.policy.step(&observation);
        self.send(&decision);
        (observation, decision)
    }

    pub(crate) fn send(&mut self, decision: &Decision) {
        for action in &decision.actions {
            let lost = self.losses > 0 && self.rng.u32(..self.losses) == 0;
            let guest = &mut self.guests[action.vm.0 as usize];
            let before = guest.messages.iter().rev().find_map(|(time, _)| *time);
            let arrival = (self.now + self.rng.u64(0..=self.delay)).max(before.unwrap_or(0));
            let time = (!lost).then_some(arrival);
            guest.messages.push_back((time, *action));
        }
    }

    /// Replaces the policy by one that knows nothing. The messages of the first one have arrived by then.
    pub(crate) fn restart(&mut self) {
        for guest in &mut self.guests {
            guest.receive(Millis::MAX);
            guest.answered = 0;
        }
        self.recent.clear();
        self.policy = Policy::new(Profile::Density);
    }
}
