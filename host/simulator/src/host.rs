// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host with its guests under a rule.

use balloon_policy::{Millis, Observation, Pages};
use balloon_simulator::rules::{self, Rule, Truth, View};
use fastrand::Rng;

use crate::guest::Guest;
use crate::load::TICK;

/// The parameters of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) seed: u64,
    pub(crate) guests: usize,
    pub(crate) time: Millis,
}

/// The result of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// Processes that honest guests killed, and VMs that the host killed, for lack of memory.
    pub(crate) kills: u64,
    /// VMs that the host killed.
    pub(crate) host_kills: u64,
    /// Time that processes of honest guests waited for memory or file data, in parts per million of the guests' time.
    pub(crate) stall: u64,
    /// The mean memory that the VMs had of the host, in pages.
    pub(crate) footprint: Pages,
    /// Changes of targets.
    pub(crate) changes: u64,
    /// Ticks in which the VMs could touch more than the pool.
    pub(crate) exposed: u64,
    /// The most that the guests used and wanted together, without their caches.
    pub(crate) peak: Pages,
}

/// The guests of a seed: the same under each rule.
fn guests(shape: Shape) -> Vec<Guest> {
    let mut rng = Rng::with_seed(shape.seed);
    (0..shape.guests).map(|_| Guest::new(rng.fork())).collect()
}

/// The pool of a seed: the guests' demands fit most of the time, and their memory does not.
pub(crate) fn pool(shape: Shape) -> Pages {
    let alone = run(shape, Pages::MAX, &mut rules::none());
    let memory: Pages = guests(shape).iter().map(|guest| guest.memory).sum();
    let mut rng = Rng::with_seed(!shape.seed);
    let pool = alone.peak * rng.u64(105..=180) / 100;
    pool.min(memory * 9 / 10)
}

/// Runs the guests of a seed under a rule.
pub(crate) fn run(shape: Shape, pool: Pages, rule: &mut dyn Rule) -> Outcome {
    let mut guests = guests(shape);
    let mut outcome = Outcome::default();
    let (mut number, mut footprint) = (0, 0_u128);
    if !rule.reporting() {
        guests.iter_mut().for_each(Guest::age);
    }
    let memory: Vec<_> = guests.iter().map(|guest| guest.memory).collect();
    for (guest, usable) in guests
        .iter_mut()
        .zip(rule.start(pool, &memory).into_iter().flatten())
    {
        guest.begin(usable);
    }
    let mut events = Rng::with_seed(shape.seed ^ 0x5eed);
    for now in (TICK..=shape.time).step_by(usize::try_from(TICK).unwrap_or(1)) {
        // A guest is reset once in two hours.
        if events.u64(..72_000) < guests.len() as u64 {
            let one = events.usize(..guests.len());
            guests[one].restart(now);
        }
        for guest in &mut guests {
            guest.tick(now, rule.reporting());
        }
        outcome.host_kills += kill_largest(&mut guests, pool, now);
        let resident: Pages = guests.iter().map(|guest| guest.resident).sum();
        footprint += u128::from(resident);
        let demand = guests
            .iter()
            .map(|guest| guest.demand().min(guest.memory))
            .sum();
        outcome.peak = outcome.peak.max(demand);
        let usable: Pages = guests.iter().map(Guest::usable).sum();
        outcome.exposed += u64::from(usable > pool);
        let targets = rule.step(&view(&guests, pool, now));
        for (index, target) in targets {
            number += 1;
            outcome.changes += 1;
            guests[index].set_target(number, target);
        }
    }
    let honest = || guests.iter().filter(|guest| !guest.lies());
    let kills = honest().map(|guest| guest.losses.kills);
    outcome.kills = kills.sum::<u64>() + outcome.host_kills;
    let stalled: u64 = honest().map(|guest| guest.losses.stalled).sum();
    outcome.stall = stalled * 1_000 / (shape.time * guests.len() as u64).max(1);
    let ticks = u128::from(shape.time / TICK).max(1);
    outcome.footprint = Pages::try_from(footprint / ticks).unwrap_or(Pages::MAX);
    outcome
}

/// The host has no swap: it kills VMs until the others fit.
fn kill_largest(guests: &mut [Guest], pool: Pages, now: Millis) -> u64 {
    let mut kills = 0;
    while guests.iter().map(|guest| guest.resident).sum::<Pages>() > pool {
        let Some(largest) = guests.iter_mut().max_by_key(|guest| guest.resident) else {
            break;
        };
        largest.restart(now);
        kills += 1;
        if kills >= 1_000 {
            break;
        }
    }
    kills
}

fn view(guests: &[Guest], pool: Pages, now: Millis) -> View {
    let vms = (0..).zip(guests).map(|(id, guest)| guest.observe(id, now));
    let truth = guests.iter().map(|guest| Truth {
        demand: guest.demand(),
        files: guest.working_files(),
    });
    View {
        truth: truth.collect(),
        observation: Observation {
            now,
            pool,
            reserve: pool / 50,
            vms: vms.collect(),
            ..Observation::default()
        },
    }
}
