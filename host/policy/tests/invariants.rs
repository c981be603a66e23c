// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The invariants of each step, whatever guests and connections do. docs/manager.md lists them by
//! number.
//!
//! `PROPTEST_CASES` sets the number of cases.

mod world;

use std::collections::BTreeSet;
use std::env;

use balloon_policy::{
    Account, Action, Cause, Claim, Decision, GIB, HostPressure, MIB, Millis, Observation, Pages,
    Policy, Pressure, Profile, Release, Reservation, Sample, Settings, Spared, Stopped, Vm, VmId,
    share,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use world::{Behaviour, Guest, World};

const SETTINGS: Settings = Settings {
    floor: GIB / 4,
    ceiling: 4 * GIB,
    weight: 1_000,
};

/// Thousands, unless the environment says otherwise.
fn cases() -> ProptestConfig {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    match env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig {
            cases: 2_000,
            ..config
        },
    }
}

/// A number of any magnitude.
fn pages() -> impl Strategy<Value = Pages> {
    (0_u32..=44, any::<u64>()).prop_map(|(bits, value)| value % (1 << bits))
}

/// Statistics of any kind, also those of a guest that is short of memory.
fn any_sample() -> impl Strategy<Value = Sample> {
    let counters = (0_u64..3, prop_oneof![0_u64..3, pages()], 0_u64..3);
    (0_u64..100_000, pages(), pages(), counters).prop_map(
        |(taken, free, available, (stalls, swapped_in, kills))| Sample {
            taken,
            free,
            available,
            stalls,
            swapped_in,
            kills,
        },
    )
}

fn any_vm() -> impl Strategy<Value = Vm> {
    let settings = (pages(), pages(), any::<u16>());
    let resident = (option::of(pages()), pages());
    let state = (pages(), pages(), pages(), resident, 0_u64..20);
    let granule = prop_oneof![Just(0_u64), Just(1), Just(16), Just(512)];
    let stopped = option::of(prop_oneof![
        Just(Stopped::Full),
        Just(Stopped::AfterOom),
        Just(Stopped::Excluded)
    ]);
    let release = (any::<bool>(), pages(), pages());
    let release = release.prop_map(|(offered, left, used)| Release {
        offered,
        left,
        used,
    });
    let flags = (
        granule,
        release,
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.1),
        stopped,
    );
    (settings, state, flags, option::of(any_sample())).prop_map(
        |((floor, ceiling, weight), (memory, target, size, resident, answered), flags, sample)| {
            let (granule, release, driver, frozen, stopped) = flags;
            let (resident, unusable) = resident;
            let settings = Settings {
                floor: floor.min(ceiling),
                ceiling,
                weight,
            };
            Vm {
                size,
                resident,
                unusable,
                answered,
                granule,
                release,
                driver,
                frozen,
                stopped,
                sample,
                ..Vm::new(VmId(0), settings, memory, target)
            }
        },
    )
}

fn any_pressure() -> impl Strategy<Value = HostPressure> {
    prop_oneof![
        Just(HostPressure::None),
        Just(HostPressure::Some),
        Just(HostPressure::Full)
    ]
}

/// An observation without any sense, except that each VM has its own id.
fn any_observation() -> impl Strategy<Value = Observation> {
    let host = (0_u64..100_000, pages(), pages(), any_pressure());
    let reservations = vec((0_u32..4, pages()), 0..3);
    (host, reservations, vec(any_vm(), 0..6)).prop_map(
        |((now, pool, reserve, pressure), reservations, mut vms)| {
            for (id, vm) in (0..).zip(&mut vms) {
                vm.id = VmId(id);
            }
            let mut reservations: Vec<_> = reservations
                .into_iter()
                .map(|(id, pages)| Reservation { id, pages })
                .collect();
            reservations.sort_by_key(|one| one.id);
            reservations.dedup_by_key(|one| one.id);
            Observation {
                now,
                pool,
                reserve,
                pressure,
                reservations,
                vms,
            }
        },
    )
}

/// Makes this an observation of the same VMs soon after another one. Their devices have set its targets.
fn follow(observation: &mut Observation, last: &Observation, decision: &Decision) {
    let now = last.now + observation.now % 3_000;
    observation.now = now;
    observation.vms.truncate(last.vms.len());
    for (vm, old) in observation.vms.iter_mut().zip(&last.vms) {
        let mut actions = decision.actions.iter();
        let action = actions.find(|action| action.vm == vm.id);
        let moves = vm.size % 2 == 1;
        *vm = Vm {
            settings: old.settings,
            memory: old.memory,
            target: action.map_or(old.target, |action| action.target),
            size: if moves {
                vm.size.min(old.memory)
            } else {
                old.size
            },
            answered: u64::MAX,
            granule: old.granule,
            driver: true,
            ..*vm
        };
        if let Some(sample) = &mut vm.sample {
            sample.taken = now.saturating_sub(sample.taken % 3_000);
        }
    }
}

fn vm<'a>(observation: &'a Observation, action: &Action) -> &'a Vm {
    let mut vms = observation.vms.iter();
    vms.find(|vm| vm.id == action.vm).expect("the VM exists")
}

fn grant(vm: &Vm, action: &Action) -> Pages {
    vm.memory.saturating_sub(action.target)
}

fn limit(observation: &Observation) -> Pages {
    let reserve = match observation.pressure {
        HostPressure::None => observation.reserve,
        HostPressure::Some => observation.reserve.saturating_add(observation.reserve / 2),
        HostPressure::Full => observation.reserve.saturating_mul(2),
    };
    observation.pool.saturating_sub(reserve)
}

/// Whether the policy may change the target of a VM.
const fn is_movable(spared: Option<Spared>) -> bool {
    !matches!(
        spared,
        Some(
            Spared::NoDriver
                | Spared::Frozen
                | Spared::Excluded
                | Spared::Refused
                | Spared::OtherController
        )
    )
}

/// 1: all that VMs can touch, and the reservations, are charged.
fn check_conservation(
    observation: &Observation,
    decision: &Decision,
    admitted: Pages,
) -> Result<(), TestCaseError> {
    let charges = decision.accounts.iter().map(|account| account.charge);
    let sum = charges.fold(admitted, Pages::saturating_add);
    prop_assert_eq!(decision.charged, sum);
    prop_assert_eq!(decision.accounts.len(), observation.vms.len());
    for (account, vm) in decision.accounts.iter().zip(&observation.vms) {
        let balloon = if vm.driver { vm.target.min(vm.size) } else { 0 };
        prop_assert!(account.charge >= vm.memory.saturating_sub(balloon));
        prop_assert!(account.charge >= vm.resident.unwrap_or(0));
    }
    Ok(())
}

/// 3: the raises and the admitted reservations of a step take no more than is free.
fn check_phases(observation: &Observation, decision: &Decision) -> Result<(), TestCaseError> {
    let free = limit(observation).saturating_sub(decision.charged);
    let raises = decision.actions.iter().map(|action| {
        let touchable = grant(vm(observation, action), action) + action.release;
        touchable.saturating_sub(action.account.charge)
    });
    let reservations = observation.reservations.iter();
    let admitted = reservations
        .filter(|one| decision.admitted.contains(&one.id))
        .map(|one| one.pages);
    prop_assert!(raises.chain(admitted).sum::<Pages>() <= free);
    Ok(())
}

/// 4: grants are between floor and ceiling, and targets are multiples of the granule. A target that follows a balloon
/// leaves the VM what it has.
fn check_bounds(observation: &Observation, decision: &Decision) -> Result<(), TestCaseError> {
    for action in &decision.actions {
        let vm = vm(observation, action);
        let granule = vm.granule.max(1);
        let grant = grant(vm, action);
        prop_assert_eq!(action.target % granule, 0);
        if action.cause == Cause::Abandoned {
            prop_assert!(action.target >= vm.size && action.target - vm.size < granule);
            continue;
        }
        let raise = grant > action.account.grant;
        prop_assert!(
            raise || grant >= vm.settings.floor.min(vm.memory),
            "{:?}",
            action
        );
        prop_assert!(!raise || grant <= vm.settings.ceiling, "{:?}", action);
    }
    Ok(())
}

/// 5: nothing is taken from a VM whose state is not known, or that must be left alone.
fn check_cuts(
    observation: &Observation,
    decision: &Decision,
    now: u64,
) -> Result<(), TestCaseError> {
    for action in &decision.actions {
        let vm = vm(observation, action);
        let fixed = vm.frozen || !vm.driver || vm.stopped == Some(Stopped::Excluded);
        prop_assert!(!fixed, "{:?}", action);
        if grant(vm, action) >= action.account.grant {
            continue;
        }
        let fresh = vm
            .sample
            .is_some_and(|sample| now.saturating_sub(sample.taken) <= 2_500);
        prop_assert!(fresh, "{:?}", action);
        let starting = action.account.spared == Some(Spared::Starting);
        prop_assert!(starting || action.account.spared.is_none(), "{:?}", action);
        // Memory that a guest under pressure has beyond its share is missing for others.
        prop_assert!(
            action.account.pressed.is_none() || action.cause != Cause::Unused,
            "{action:?}"
        );
    }
    Ok(())
}

/// 14: the numbers of an action imply it.
fn check_explanation(observation: &Observation, decision: &Decision) -> Result<(), TestCaseError> {
    for action in &decision.actions {
        let account = &action.account;
        prop_assert!(decision.accounts.contains(account));
        let vm = vm(observation, action);
        let granule = vm.granule.max(1);
        let exact = vm.memory.saturating_sub(account.share);
        match action.cause {
            Cause::Pressed(sign) => {
                prop_assert_eq!(account.pressed, Some(sign));
                prop_assert!(account.share > account.grant && action.target >= exact);
            }
            Cause::Wanted => {
                prop_assert!(account.share > account.grant && action.target >= exact);
            }
            Cause::Unused => {
                prop_assert!(account.share >= account.want && account.want < account.grant);
                prop_assert_eq!(action.target, exact / granule * granule);
            }
            Cause::Ceiling => {
                prop_assert!(account.share == vm.settings.ceiling && account.share < account.grant);
                prop_assert_eq!(action.target, exact / granule * granule);
            }
            Cause::Contended => {
                prop_assert!(account.share < account.want && account.share < account.grant);
                prop_assert_eq!(action.target, exact / granule * granule);
            }
            Cause::Abandoned => prop_assert_eq!(account.spared, Some(Spared::Uncooperative)),
        }
    }
    Ok(())
}

fn check(
    observation: &Observation,
    decision: &Decision,
    admitted: Pages,
) -> Result<(), TestCaseError> {
    check_conservation(observation, decision, admitted)?;
    check_phases(observation, decision)?;
    check_bounds(observation, decision)?;
    check_explanation(observation, decision)
}

/// The reference: page after page.
fn share_by_page(capacity: Pages, claims: &[Claim]) -> Vec<Pages> {
    let floors: Pages = claims.iter().map(|claim| claim.floor).sum();
    let fits = floors <= capacity;
    let mut shares: Vec<_> = claims
        .iter()
        .map(|claim| if fits { claim.floor } else { 0 })
        .collect();
    for _ in shares.iter().sum::<Pages>()..capacity {
        let most = |index: usize| {
            if fits {
                claims[index].want
            } else {
                claims[index].floor
            }
        };
        let next = (0..claims.len())
            .filter(|&index| shares[index] < most(index))
            .min_by(|&a, &b| {
                let level = |index: usize, other: usize| {
                    u128::from(shares[index] + 1) * u128::from(claims[other].weight.max(1))
                };
                level(a, b).cmp(&level(b, a))
            });
        match next {
            Some(index) => shares[index] += 1,
            None => break,
        }
    }
    shares
}

fn small_claims() -> impl Strategy<Value = Vec<Claim>> {
    let claim = (0_u64..60, 0_u64..100, 0_u16..9).prop_map(|(floor, want, weight)| Claim {
        floor,
        want,
        weight,
    });
    vec(claim, 0..6)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn invariant_1_4_5_13_any_observations(
        observations in vec(any_observation(), 1..12), obeys in any::<bool>(),
    ) {
        let mut policy = Policy::new(Profile::Density);
        let mut now = 0;
        let mut admitted = BTreeSet::new();
        let mut last: Option<(Observation, Decision)> = None;
        for mut observation in observations {
            if let Some((before, decision)) = last.filter(|_| obeys) {
                follow(&mut observation, &before, &decision);
            }
            now = now.max(observation.now);
            let decision = policy.step(&observation);
            let reservations = &observation.reservations;
            admitted.retain(|&id| reservations.iter().any(|one| one.id == id));
            let held = reservations.iter().filter(|one| admitted.contains(&one.id));
            check(&observation, &decision, held.map(|one| one.pages).sum())?;
            check_cuts(&observation, &decision, now)?;
            admitted.extend(&decision.admitted);
            last = Some((observation, decision));
        }
    }

    #[test]
    fn invariant_2_guests_never_have_more_than_the_pool(seed in any::<u64>(), count in 1_usize..6) {
        let mut world = World::hostile(seed, count);
        for step in 0..60 {
            let time = world.rng.u64(20..=3_000);
            let (observation, decision) = world.step(time);
            check(&observation, &decision, 0)?;
            prop_assert!(world.reachable() <= world.limit(), "step {}", step);
            if world.rng.u32(..30) == 0 {
                world.restart();
                prop_assert!(world.reachable() <= world.limit(), "restart {}", step);
            }
            // Demands change all the time.
            for index in 0..world.guests.len() {
                if world.rng.u32(..4) == 0 {
                    world.guests[index].used = world.rng.u64(0..=world.guests[index].memory);
                }
                world.guests[index].frozen = world.rng.u32(..10) == 0;
                if world.rng.u32(..4) == 0 {
                    world.guests[index].notice();
                }
            }
        }
    }

    #[test]
    fn invariant_3_raises_are_paid_first(mut observation in any_observation()) {
        // Guests that are short, so that there are raises.
        let now = 50_000;
        for vm in &mut observation.vms {
            (vm.driver, vm.frozen, vm.stopped, vm.answered) = (true, false, None, 0);
            vm.settings.ceiling = vm.memory;
            vm.size = vm.size.min(vm.memory);
            vm.target = vm.size;
        }
        let mut policy = Policy::new(Profile::Density);
        for step in 0..3 {
            observation.now = now + step * 100;
            for vm in &mut observation.vms {
                let sample = Sample { taken: observation.now, free: 0, available: 0, stalls: step, swapped_in: 0, kills: 0 };
                vm.sample = Some(sample);
            }
            let decision = policy.step(&observation);
            check_phases(&observation, &decision)?;
            // The device has executed nothing yet: the messages still count, an hour later as well.
            observation.now += if step == 2 { 3_600_000 } else { 0 };
            let next = policy.step(&observation);
            let sent = decision.actions.iter().map(|action| {
                grant(vm(&observation, action), action).saturating_sub(action.account.charge)
            });
            let reservations = observation.reservations.iter().filter(|one| decision.admitted.contains(&one.id));
            let paid = sent.chain(reservations.map(|one| one.pages)).sum::<Pages>();
            prop_assert_eq!(next.charged, decision.charged + paid);
        }
    }

    #[test]
    fn invariant_6_a_guest_in_need_gets_free_memory_at_once(used in 2_u64..8, others in 0_usize..4) {
        let (memory, used) = (8 * GIB, used * GIB / 2);
        let mut guests = vec![Guest::new(Behaviour::Honest, memory, used, memory - used)];
        // They pay: all of their memory is free.
        guests.extend((0..others).map(|_| Guest::new(Behaviour::Honest, memory, GIB / 8, 0)));
        let taken: Pages = guests.iter().map(Guest::reachable).sum();
        let mut world = World::new(0, taken + GIB, guests);
        let (_, decision) = world.step(100);
        let (_, next) = world.step(100);
        let mut actions = decision.actions.iter().chain(&next.actions);
        let raise = actions.find(|action| action.vm == VmId(0)).expect("a raise");
        prop_assert!(matches!(raise.cause, Cause::Pressed(_) | Cause::Wanted));
        prop_assert!(memory - raise.target >= used + 64 * MIB);
    }

    #[test]
    fn invariant_7_no_guest_starves_beside_one_with_more_than_its_share(
        used in vec(1_u64..32, 2..6), greedy in any::<bool>(), pool in 4_u64..16,
    ) {
        let memory = 4 * GIB;
        let mut guests: Vec<_> = used.iter().map(|used| Guest::new(Behaviour::Honest, memory, used * GIB / 8, 0)).collect();
        if greedy {
            guests[0].behaviour = Behaviour::Greedy;
        }
        let mut world = World::new(0, pool * GIB, guests);
        for _ in 0..600 {
            world.step(100);
        }
        // One needs more; the others have to pay, and soon.
        let last = world.guests.len() - 1;
        world.guests[last].used = memory - GIB / 2;
        for _ in 0..20 {
            world.step(100);
        }
        let (observation, decision) = world.step(100);
        let granted = |account: &balloon_policy::Account| {
            let mut actions = decision.actions.iter();
            let action = actions.find(|action| action.vm == account.vm);
            action.map_or(account.grant, |action| account.memory - action.target)
        };
        let starving = observation.vms.iter().zip(&decision.accounts).find(|(vm, account)| {
            let least = vm.memory / 64 + MIB;
            granted(account) + least < account.need.min(account.share)
        });
        let rich = observation.vms.iter().zip(&decision.accounts).find(|(vm, account)| {
            // Guests give no memory that they use.
            granted(account) > account.share.max(account.need) + vm.memory / 64 + MIB && account.spared.is_none()
        });
        prop_assert!(starving.is_none() || rich.is_none(), "{starving:?} {rich:?}");
    }

    #[test]
    fn invariant_8_shares_are_those_of_the_reference(capacity in 0_u64..300, claims in small_claims()) {
        prop_assert_eq!(share(capacity, &claims), share_by_page(capacity, &claims));
    }

    #[test]
    fn invariant_8_shares_are_monotonous(
        capacity in pages(),
        more in pages(),
        claims in vec((pages(), pages(), any::<u16>()), 1..8),
        changed in any::<prop::sample::Index>(),
    ) {
        let mut claims: Vec<_> = claims
            .into_iter()
            .map(|(floor, want, weight)| Claim { floor, want: want.max(floor), weight })
            .collect();
        let floors: Pages = claims.iter().map(|claim| claim.floor).sum();
        let capacity = capacity + floors;
        let shares = share(capacity, &claims);
        prop_assert!(shares.iter().sum::<Pages>() <= capacity);
        for (claim, &share) in claims.iter().zip(&shares) {
            prop_assert!(claim.floor <= share && share <= claim.want);
        }
        let no_less = |a: &[Pages], b: &[Pages]| a.iter().zip(b).all(|(a, b)| a >= b);
        // In the capacity.
        prop_assert!(no_less(&share(capacity + more, &claims), &shares));
        // What was shared is shared the same way.
        let settled: Vec<_> = claims.iter().zip(&shares).map(|(claim, &want)| Claim { want, ..*claim }).collect();
        prop_assert_eq!(&share(capacity, &settled), &shares);
        // A claim that wants more, or weighs more, gets no less, and the others get no more.
        let index = changed.index(claims.len());
        let before = claims[index];
        claims[index].want += more;
        let greedy = share(capacity, &claims);
        prop_assert!(greedy[index] >= shares[index]);
        claims[index] = Claim { weight: before.weight.saturating_add(7), ..before };
        prop_assert!(share(capacity, &claims)[index] >= shares[index]);
        // A new claim takes, and gives nothing.
        claims[index] = before;
        claims.push(Claim { floor: 0, want: more, weight: 9 });
        let crowded = share(capacity, &claims);
        prop_assert!(no_less(&shares, &crowded[..shares.len()]));
        prop_assert!((0..shares.len()).all(|other| other == index || greedy[other] <= shares[other]));
    }

    #[test]
    fn invariant_9_constant_demands_end_in_rest(
        used in vec(1_u64..24, 1..6), pool in 6_u64..40, kept in 0_u64..8, seed in any::<u64>(),
    ) {
        let memory = 4 * GIB;
        let guests = used.iter().map(|used| {
            let mut guest = Guest::new(Behaviour::Honest, memory, used * GIB / 8, 0);
            guest.kept = kept * GIB / 8;
            guest
        });
        let mut world = World::new(seed, pool * GIB, guests.collect());
        // Drivers that keep memory have been asked for it once then. They are asked again after five minutes.
        for _ in 0..60 {
            world.step(1_000);
        }
        let needs: Pages = used.iter().map(|used| used * GIB / 8 + GIB / 2 + kept * GIB / 8).sum();
        for _ in 0..230 {
            // Less than the hysteresis.
            for (guest, used) in world.guests.iter_mut().zip(&used) {
                guest.used = used * GIB / 8 + world.rng.u64(0..=4 * MIB);
            }
            let (observation, decision) = world.step(1_000);
            // With guests that lack memory there is no rest.
            prop_assert!(decision.actions.is_empty() || needs > limit(&observation), "{:?}", decision.actions);
        }
    }

    #[test]
    fn invariant_10_others_get_what_a_guest_would_leave_that_demands_everything(
        used in vec(0_u64..32, 2..6), pool in 2_u64..16, lies in vec(option::of(any_sample()), 1..4),
    ) {
        let memory = 4 * GIB;
        // At first this guest has nearly all of the memory.
        let guests = (0..used.len()).map(|index| {
            let used = if index == 0 { memory } else { GIB / 8 };
            Guest::new(Behaviour::Honest, memory, used, 0)
        });
        let mut world = World::new(0, pool * GIB, guests.collect());
        let first = world.observe();
        for (guest, used) in world.guests.iter_mut().zip(&used) {
            guest.used = used * GIB / 8;
        }
        let second = world.observe();
        let accounts = |lie: &dyn Fn(usize) -> Option<Sample>| {
            let mut policy = Policy::new(Profile::Density);
            let mut accounts = policy.step(&first).accounts;
            for index in 0..lies.len() {
                let mut observation = second.clone();
                observation.now += 31_000 + 1_000 * (index as u64);
                observation.vms[0].sample = lie(index);
                for sample in observation.vms.iter_mut().filter_map(|vm| vm.sample.as_mut()) {
                    sample.taken = observation.now;
                }
                accounts = policy.step(&observation).accounts;
            }
            accounts
        };
        let demand = |index| Some(Sample {
            taken: 0, free: 0, available: 0, stalls: index as u64, swapped_in: 0, kills: 0,
        });
        let (lied, demanded) = (accounts(&|index| lies[index]), accounts(&demand));
        // Without statistics it keeps what it has, and gets no more unless the others have enough.
        let keeps = lies.last() == Some(&None) && lied[0].share <= lied[0].grant;
        for (lied, demanded) in lied.iter().zip(&demanded).skip(1) {
            prop_assert!(lied.share >= demanded.share || keeps, "{lied:?} {demanded:?}");
        }
    }

    #[test]
    fn invariant_11_a_restart_cuts_nothing_and_changes_nothing(
        used in vec(1_u64..16, 1..5), at in 1_u64..200,
    ) {
        let memory = 4 * GIB;
        let end = |restart: Option<u64>| {
            let guests = used.iter().map(|used| Guest::new(Behaviour::Honest, memory, used * GIB / 8, 0)).collect();
            let mut world = World::new(0, 24 * GIB, guests);
            for second in 0..500 {
                if Some(second) == restart {
                    world.restart();
                }
                let (observation, decision) = world.step(1_000);
                let grace = restart.is_some_and(|restart| (restart..restart + 29).contains(&second));
                if grace {
                    for action in &decision.actions {
                        prop_assert!(grant(vm(&observation, action), action) >= action.account.grant);
                    }
                }
            }
            Ok(world.guests.iter().map(Guest::grant).collect::<Vec<_>>())
        };
        let (restarted, other) = (end(Some(at))?, end(None)?);
        for (restarted, other) in restarted.iter().zip(&other) {
            prop_assert!(restarted.abs_diff(*other) <= memory / 64, "{restarted} {other}");
        }
    }

    #[test]
    fn invariant_12_a_worse_host_raises_no_share(observations in vec(any_observation(), 1..6)) {
        let shares = |pressure| {
            let mut policy = Policy::new(Profile::Density);
            let (last, before) = observations.split_last().expect("there is one");
            for observation in before {
                policy.step(observation);
            }
            let worse = Observation { pressure, ..last.clone() };
            policy.step(&worse).accounts
        };
        let pressures = [HostPressure::None, HostPressure::Some, HostPressure::Full];
        let [none, some, full] = pressures.map(shares);
        for ((none, some), full) in none.iter().zip(&some).zip(&full) {
            if is_movable(none.spared) {
                prop_assert!(some.share <= none.share && full.share <= some.share);
            }
        }
    }

    /// What guests report and use makes no difference.
    #[test]
    fn invariant_15_the_shares_without_a_manager_fit(observation in any_observation()) {
        let decision = Policy::new(Profile::Density).step(&observation);
        let vms = observation.vms.iter().zip(&decision.accounts);
        let movable: Vec<_> = vms.filter(|(_, account)| is_movable(account.spared)).collect();
        let floors = movable.iter().map(|(vm, _)| vm.settings.floor.min(vm.settings.ceiling).min(vm.memory));
        let floors = floors.fold(0, Pages::saturating_add);
        let shares = movable.iter().map(|(_, account)| account.fallback);
        let shares = shares.fold(0, Pages::saturating_add);
        prop_assert!(shares <= decision.capacity.max(floors), "{shares} {floors} {}", decision.capacity);
        for (vm, account) in &movable {
            prop_assert!(account.fallback <= vm.settings.ceiling.min(vm.memory));
            prop_assert!(account.fallback >= vm.settings.floor.min(vm.settings.ceiling).min(vm.memory));
        }
        // All of them get all of their memory, or the capacity is used up.
        let all = movable.iter().all(|(vm, account)| account.fallback == vm.settings.ceiling.min(vm.memory));
        prop_assert!(all || shares >= decision.capacity);
    }

    #[test]
    fn invariant_13_counters_that_go_back_mean_nothing(
        old in any_sample(), new in any_sample(), available in 52 * MIB..400 * MIB,
    ) {
        let mut policy = Policy::new(Profile::Density);
        let mut guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB, 2 * GIB);
        guest.settings.floor = GIB;
        let mut world = World::new(0, 64 * GIB, vec![guest]);
        let mut observation = world.observe();
        // The guest has about as much as its headroom, and more than a quarter of that: a kill would count.
        let low = |sample| Sample { free: available, available, ..sample };
        observation.vms[0].sample = Some(Sample { taken: 1_000, ..low(old) });
        policy.step(&observation);
        observation.now += 1_000;
        let back = |new: u64, old: u64| new.min(old);
        observation.vms[0].sample = Some(Sample {
            taken: 2_000,
            stalls: back(new.stalls, old.stalls),
            swapped_in: back(new.swapped_in, old.swapped_in),
            kills: back(new.kills, old.kills),
            ..low(new)
        });
        let decision = policy.step(&observation);
        prop_assert_eq!(decision.accounts[0].pressed, None);
    }

    #[test]
    fn invariant_14_replay_gives_the_same_actions(seed in any::<u64>(), count in 1_usize..6) {
        let mut world = World::hostile(seed, count);
        let mut log = Vec::new();
        for _ in 0..40 {
            let time = world.rng.u64(20..=3_000);
            log.push(world.step(time));
        }
        let mut policy = Policy::new(Profile::Density);
        for (observation, decision) in &log {
            prop_assert_eq!(&policy.step(observation), decision);
            check_explanation(observation, decision)?;
        }
    }
}

proptest! {
    // Each case takes ten minutes of simulated time.
    #![proptest_config(ProptestConfig { cases: cases().cases / 20, ..cases() })]

    #[test]
    fn invariant_9_periodic_demands_cost_few_actions(period in 20_usize..120, high in 4_u64..12) {
        let memory = 4 * GIB;
        let guests = (0..3).map(|_| Guest::new(Behaviour::Honest, memory, GIB / 4, 0)).collect();
        let mut world = World::new(0, 16 * GIB, guests);
        world.policy = Policy::new(Profile::Balanced);
        let mut actions = 0_usize;
        for second in 0..600 {
            let busy = second % period < period / 2;
            world.guests[0].used = if busy { high * GIB / 4 } else { GIB / 4 };
            for _ in 0..10 {
                actions += world.step(100).1.actions.len();
            }
        }
        // A raise and a cut in each period, and some to begin with.
        prop_assert!(actions <= 2 * 600 / period + 20, "{actions} actions");
    }
}

/// A reservation gets what guests do not need, and waits for the rest.
#[test]
fn a_reservation_takes_nothing_that_guests_need() {
    for (used, admitted) in [(GIB, true), (3 * GIB, false)] {
        let guests = vec![Guest::new(Behaviour::Honest, 4 * GIB, used, 0)];
        let mut world = World::new(0, 6 * GIB, guests);
        let mut got = false;
        for _ in 0..600 {
            world.step(100);
            let mut observation = world.observe();
            observation.now = world.now;
            observation.reservations = vec![Reservation {
                id: 1,
                pages: 3 * GIB,
            }];
            let decision = world.policy.step(&observation);
            got |= decision.admitted == [1];
            world.send(&decision);
        }
        assert_eq!(got, admitted);
        assert!(world.guests[0].grant() >= used);
    }
}

/// Memory for a need to come is of no use to guests that cannot do with what they have.
#[test]
fn guests_that_lack_memory_get_the_fast_reserve() {
    let used = 3 * GIB;
    let guest = || Guest::new(Behaviour::Honest, 4 * GIB, used, GIB);
    // Without the fast reserve of half a GiB, there is not enough for both.
    let mut world = World::new(0, 2 * used + GIB / 4, vec![guest(), guest()]);
    for _ in 0..600 {
        world.step(100);
    }
    let least = world.guests.iter().map(Guest::grant).min();
    assert!(least > Some(used + 96 * MIB), "{least:?}");
}

/// Statistics of a guest with so much free memory, without signs of pressure.
const fn sample(taken: Millis, free: Pages) -> Sample {
    Sample {
        taken,
        free,
        available: free,
        stalls: 0,
        swapped_in: 0,
        kills: 0,
    }
}

/// Decides for a host with one VM.
fn decide(policy: &mut Policy, now: Millis, pool: Pages, vm: Vm) -> Decision {
    policy.step(&Observation {
        now,
        pool,
        vms: vec![vm],
        ..Observation::default()
    })
}

/// When memory is missing, the VM with the most to spare gives it. Another one keeps what it has for a while.
#[test]
fn memory_is_taken_from_the_vm_with_the_most_to_spare() {
    let mut policy = Policy::new(Profile::Density);
    let mut targets = [2 * GIB; 2];
    let mut step = |now, pool, free: [Pages; 2]| {
        let vms = (0..).zip(targets.into_iter().zip(free));
        let vms = vms.map(|(id, (target, free))| Vm {
            size: target,
            answered: u64::MAX,
            sample: Some(Sample {
                free,
                ..sample(now, 3 * GIB / 2)
            }),
            ..Vm::new(VmId(id), SETTINGS, 4 * GIB, target)
        });
        let decision = policy.step(&Observation {
            now,
            pool,
            vms: vms.collect(),
            ..Observation::default()
        });
        let mut lowered = Vec::new();
        for action in decision.actions {
            targets[action.vm.0 as usize] = action.target;
            if action.target > action.before {
                lowered.push(action.vm);
            }
        }
        lowered
    };
    // Both get more for their caches, so that nothing is taken from them for ten seconds unless memory is missing.
    assert_eq!(step(60_000, 5 * GIB, [0, 0]), []);
    let free = [GIB / 2, 3 * GIB / 2];
    assert_eq!(step(65_000, 5 * GIB, free), []);
    assert_eq!(step(66_000, 17 * GIB / 4, free), [VmId(1)]);
    assert_eq!(step(67_000, 17 * GIB / 4, free), []);
}

/// While another VM gives memory slowly, a guest in need does not get a new target for each part of it.
#[test]
fn memory_that_comes_slowly_is_given_in_few_raises() {
    let giver = Guest::new(Behaviour::Slow, 4 * GIB, GIB / 2, 0);
    let needy = Guest::new(Behaviour::Honest, 4 * GIB, 3 * GIB, 2 * GIB);
    let mut world = World::new(0, 25 * GIB / 4, vec![giver, needy]);
    let mut raises = 0;
    for _ in 0..5 {
        let (_, decision) = world.step(200);
        raises += decision
            .actions
            .iter()
            .filter(|one| one.vm == VmId(1))
            .count();
    }
    assert!((1..=2).contains(&raises), "{raises} raises");
    assert!(world.guests[0].size > 20 * MIB);
}

/// A driver that pauses after it ran out of memory inflates again with the next target.
#[test]
fn a_guest_that_ran_out_of_memory_can_be_asked_again() {
    let mut policy = Policy::new(Profile::Density);
    let mut target = 3 * GIB;
    for now in (60_000..70_000).step_by(100) {
        let vm = Vm {
            size: GIB,
            resident: Some(3 * GIB),
            answered: u64::MAX,
            stopped: (now > 60_000).then_some(Stopped::AfterOom),
            sample: Some(sample(now, 2 * GIB)),
            ..Vm::new(VmId(0), SETTINGS, 4 * GIB, target)
        };
        let decision = decide(&mut policy, now, 8 * GIB, vm);
        target = decision
            .actions
            .last()
            .map_or(target, |action| action.target);
        // No process was killed.
        assert_ne!(decision.accounts[0].pressed, Some(Pressure::Oom));
        let spared = decision.accounts[0].spared;
        assert_ne!(spared, Some(Spared::Uncooperative), "at {now}");
    }
}

/// A driver stops for a guest that has no memory. It reports that until it looks again.
#[test]
fn memory_that_a_guest_has_just_freed_is_not_kept_by_its_driver() {
    let mut policy = Policy::new(Profile::Density);
    for now in (60_000..62_000).step_by(100) {
        let free = if now < 60_700 { 0 } else { 2 * GIB };
        let vm = Vm {
            size: GIB,
            answered: u64::MAX,
            stopped: Some(Stopped::Full),
            sample: Some(sample(now, free)),
            ..Vm::new(VmId(0), SETTINGS, 4 * GIB, 3 * GIB)
        };
        let decision = decide(&mut policy, now, 8 * GIB, vm);
        assert_eq!(decision.accounts[0].kept, 0, "at {now}");
    }
}

/// For two seconds after it killed a process, a guest needs more. For five minutes it wants that.
#[test]
fn a_guest_that_killed_a_process_does_not_keep_memory_from_others_in_need() {
    let mut policy = Policy::new(Profile::Density);
    for now in (60_000..90_000).step_by(100) {
        let is_dead = now >= 61_000;
        let free = if is_dead { 3 * GIB / 2 } else { 0 };
        let sample = Sample {
            kills: u64::from(is_dead),
            ..sample(now, free)
        };
        let vm = Vm {
            answered: u64::MAX,
            sample: Some(sample),
            ..Vm::new(VmId(0), SETTINGS, 4 * GIB, 2 * GIB)
        };
        let account = decide(&mut policy, now, 2 * GIB, vm).accounts[0];
        let lasts = (61_000..=63_000).contains(&now);
        assert_eq!(account.pressed == Some(Pressure::Oom), lasts, "at {now}");
        if now > 63_000 {
            assert!(account.need < GIB && account.want > 2 * GIB, "{account:?}");
        }
    }
}

/// The account of a guest that has not touched `untouched` of its 2 GiB, and can never use `unusable` of it.
fn account_of(available: Pages, untouched: Pages, unusable: Pages) -> Account {
    let mut policy = Policy::new(Profile::Density);
    let mut account = None;
    for now in (60_000..61_000).step_by(100) {
        let vm = Vm {
            resident: Some(2 * GIB - untouched),
            unusable,
            answered: u64::MAX,
            sample: Some(sample(now, available)),
            ..Vm::new(VmId(0), SETTINGS, 4 * GIB, 2 * GIB)
        };
        account = decide(&mut policy, now, 8 * GIB, vm).accounts.pop();
    }
    account.expect("an account")
}

/// Memory for a crash kernel is never touched, and never given to processes.
#[test]
fn memory_that_a_guest_can_never_use_counts_as_touched() {
    let pressed = |untouched, unusable| account_of(0, untouched, unusable).pressed;
    assert_eq!(pressed(0, 0), Some(Pressure::LowAvailable));
    assert_eq!(pressed(GIB, 0), None);
    assert_eq!(pressed(GIB, GIB), Some(Pressure::LowAvailable));
    // Half a GiB is available of the GiB that processes can have.
    let account = account_of(GIB / 2, GIB, GIB);
    assert_eq!(account.used, Some(3 * GIB / 2));
    assert!(account.need > 3 * GIB / 2, "{account:?}");
}

/// Another program's target is left alone, and the target after a lease is not.
#[test]
fn a_target_after_a_lease_is_none_of_another_program() {
    for lapsed in [false, true] {
        let guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB, 2 * GIB);
        let mut world = World::new(0, 8 * GIB, vec![guest]);
        world.step(1_000);
        let mut observation = world.observe();
        observation.vms[0].target += GIB;
        observation.vms[0].lapsed = lapsed;
        let spared = world.policy.step(&observation).accounts[0].spared;
        assert_eq!(
            spared == Some(Spared::OtherController),
            !lapsed,
            "{spared:?}"
        );
    }
}

/// A driver that has stopped a little below its target reports so until it works on the next one.
#[test]
fn a_guest_that_has_stopped_has_a_second_for_its_next_target() {
    let guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB, GIB);
    let mut world = World::new(0, 8 * GIB, vec![guest]);
    let mut spared = |target, stopped| {
        world.now += 100;
        let mut observation = world.observe();
        let vm = &mut observation.vms[0];
        (vm.target, vm.stopped, vm.lapsed) = (target, stopped, true);
        world.policy.step(&observation).accounts[0].spared
    };
    for _ in 0..20 {
        spared(GIB + 40 * MIB, Some(Stopped::Full));
    }
    for step in 0..20 {
        let spared = spared(2 * GIB, Some(Stopped::Full));
        let gave_up = spared == Some(Spared::Uncooperative);
        assert_eq!(gave_up, step >= 10, "step {step}");
    }
}

/// Its daemon waits while the guest boots, or withholds memory from the host: the balloon counts as empty.
#[test]
fn a_guest_that_was_left_alone_is_not_uncooperative() {
    let mut guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB / 2, 3 * GIB);
    // It keeps its target.
    (guest.settings.floor, guest.settings.ceiling) = (GIB, GIB);
    let mut world = World::new(0, 8 * GIB, vec![guest]);
    let mut step = |frozen| {
        world.now += 100;
        let mut observation = world.observe();
        let vm = &mut observation.vms[0];
        vm.frozen = frozen;
        if frozen {
            vm.size = 0;
        }
        world.policy.step(&observation).accounts[0]
    };
    for (time, frozen) in [(60_000, false), (40_000, true), (60_000, false)] {
        for _ in 0..time / 100 {
            let account = step(frozen);
            assert_ne!(account.spared, Some(Spared::Uncooperative));
            assert_ne!(account.pressed, Some(Pressure::SelfDeflated));
        }
    }
}

/// A device that is asked again may report the time of the same statistics a little differently.
#[test]
fn statistics_that_are_not_newer_change_nothing() {
    let guest = Guest::new(Behaviour::Honest, 4 * GIB, 3 * GIB, 0);
    let mut world = World::new(0, 8 * GIB, vec![guest]);
    let mut account = |used, taken| {
        world.now += 1_000;
        world.guests[0].used = used;
        let mut observation = world.observe();
        observation.vms[0]
            .sample
            .as_mut()
            .expect("statistics")
            .taken = taken;
        world.policy.step(&observation).accounts[0]
    };
    account(3 * GIB, 2_000);
    let after = account(GIB, 3_000);
    assert!(after.used == Some(GIB) && after.want > 2 * GIB, "{after:?}");
    for taken in [2_999, 3_000] {
        assert_eq!(account(GIB, taken), after);
    }
}

/// It deflates to a smaller target when it gets a larger one.
#[test]
fn a_balloon_that_shrinks_to_the_target_before_has_not_shrunk_by_itself() {
    let mut guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB / 2, 3 * GIB);
    // The policy sends no targets.
    (guest.settings.floor, guest.settings.ceiling) = (GIB, GIB);
    let mut world = World::new(0, 8 * GIB, vec![guest]);
    let mut pressed = |target, size| {
        world.now += 20;
        let mut observation = world.observe();
        let vm = &mut observation.vms[0];
        (vm.target, vm.size, vm.lapsed) = (target, size, true);
        world.policy.step(&observation).accounts[0].pressed
    };
    assert_eq!(pressed(3 * GIB, 3 * GIB), None);
    assert_eq!(pressed(GIB, 5 * GIB / 2), None);
    assert_eq!(pressed(5 * GIB / 2, 2 * GIB), None);
    assert_eq!(pressed(5 * GIB / 2, GIB), Some(Pressure::SelfDeflated));
}

/// Resident memory is read once a second, and another VM causes a decision each 100 ms.
#[test]
fn growth_is_measured_over_the_time_between_two_readings() {
    let pressed = |growth: Pages| {
        let mut policy = Policy::new(Profile::Density);
        let guest = Guest::new(Behaviour::Honest, 4 * GIB, GIB, 0);
        let mut world = World::new(0, 8 * GIB, vec![guest]);
        let mut signs = Vec::new();
        for step in 0..21 {
            world.now += 100;
            let mut observation = world.observe();
            let resident = 4 * GIB - 2 * growth - MIB + step / 10 * growth;
            observation.vms[0].resident = Some(resident);
            let decision = policy.step(&observation);
            signs.extend(decision.accounts[0].pressed);
        }
        signs.first().copied()
    };
    assert_eq!(pressed(100 * MIB), None);
    assert_eq!(pressed(700 * MIB), Some(Pressure::Growth));
}

/// QEMU stops the device of a VM that is paused, for a snapshot or by `virsh suspend`.
#[test]
fn a_vm_that_is_paused_for_a_moment_costs_others_nothing() {
    let used = [GIB, 3 * GIB / 2, GIB];
    let guests = used.map(|used| Guest::new(Behaviour::Honest, 4 * GIB, used, 0));
    let mut world = World::new(0, 5 * GIB, guests.into());
    for _ in 0..300 {
        world.step(1_000);
    }
    let mut step = |driver| {
        world.now += 100;
        let mut observation = world.observe();
        observation.vms[0].driver = driver;
        world.policy.step(&observation)
    };
    for driver in [[true; 3], [false; 3], [true; 3]].concat() {
        let decision = step(driver);
        assert_eq!(decision.actions, []);
        let account = decision.accounts[0];
        // It may be a guest that boots, which may touch all of its memory.
        assert_eq!(account.charge == account.memory, !driver);
        assert_eq!(account.spared, (!driver).then_some(Spared::NoDriver));
    }
    for time in 0..20 {
        assert_eq!(step(false).actions, [], "after {time} steps");
    }
    // It does not come back. The others give what they do not need.
    let causes = step(false).actions.into_iter().map(|action| action.cause);
    assert!(causes.collect::<Vec<_>>().contains(&Cause::Contended));
}
