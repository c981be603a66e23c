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
    /// Drivers have the reserve of `virtio_balloon_rs` by default, instead of a small one.
    pub(crate) default_reserves: bool,
    /// The pool has room for the reserves of drivers, too.
    pub(crate) room: bool,
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
    /// The most that the guests used and wanted together, without their caches. The reserves of drivers count if the
    /// pool has room for them.
    pub(crate) peak: Pages,
}

/// The guests of a seed: the same under each rule.
fn guests(shape: Shape) -> Vec<Guest> {
    let mut rng = Rng::with_seed(shape.seed);
    (0..shape.guests)
        .map(|_| Guest::new(shape.default_reserves, rng.fork()))
        .collect()
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
    run_guests(guests(shape), shape, pool, rule)
}

fn run_guests(mut guests: Vec<Guest>, shape: Shape, pool: Pages, rule: &mut dyn Rule) -> Outcome {
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
            .map(|guest| {
                let reserve = if shape.room { guest.reserve } else { 0 };
                (guest.demand() + reserve).min(guest.memory)
            })
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

#[cfg(test)]
mod tests {
    use balloon_policy::{GIB, MIB};

    use super::*;
    use crate::load::{Kind, Process};

    /// Six guests of 4 GiB on a pool of 12 GiB have short jobs, like those of `make bench ONLY=rotate`. Their drivers
    /// leave them more memory than the policy, as `virtio_balloon_rs` does by default.
    #[test]
    fn the_policy_seldom_changes_the_targets_of_guests_that_take_turns() {
        let shape = Shape {
            seed: 0,
            guests: 6,
            time: 600_000,
            default_reserves: true,
            room: true,
        };
        let mut rng = Rng::with_seed(shape.seed);
        let guests = (0..shape.guests).map(|_| {
            let idle = Kind::Steady { size: 400 * MIB };
            let jobs = Kind::Jobs {
                size: 1536 * MIB,
                length: 7_000,
                pause: 29_000,
            };
            let kinds = [(idle, 100 * MIB), (jobs, 40 * MIB)];
            let processes = kinds.map(|(kind, speed)| Process::new(kind, speed, &mut rng));
            Guest::running(4 * GIB, 488 * MIB, processes.into(), rng.fork())
        });
        let guests: Vec<_> = guests.collect();
        let mut rules = rules::all().into_iter();
        let mut density = rules
            .find(|rule| rule.name() == "ours, density")
            .expect("there is one");
        let outcome = run_guests(guests, shape, 12 * GIB, density.as_mut());
        assert_eq!((outcome.kills, outcome.exposed), (0, 0), "{outcome:?}");
        let changes = outcome.changes * 60_000 / shape.time / shape.guests as u64;
        assert!(changes <= 12, "{changes} changes for each VM and minute");
    }
}
