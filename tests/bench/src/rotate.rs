// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests take turns in needing more memory than their host can give to all of them.

use std::time::Duration;

use anyhow::{Result, ensure};
use vm::{Guest, Kernel, Offer, Samples, Size};

use crate::bench::{Bench, Benchmark, Setting};
use crate::claim::Claim;
use crate::contestant::{By, Contestant, Device};
use crate::record::{Record, Run, Subject};
use host::{Host, MANAGER, Seen};
use phase::{Event, LIMIT, Outcome, Phase};

mod figures;
mod host;
mod phase;

pub(crate) const BENCHMARK: Benchmark = Benchmark {
    names: &[
        "rotate",
        "rotate-storm",
        "rotate-single",
        "rotate-killed",
        "rotate-silent",
    ],
    kernel: Kernel::Test,
    settings: &[Setting::plain(|records| claims(records, "rotate"))],
    by_default: false,
    answers: "Time until a job has its memory in one of six guests of 4 GiB, on a pool of 9 GiB that balloon-manager or \
              another rule divides. Jobs take turns (rotate), start all at once (storm), fill one guest (single), start after \
              the rule's program was killed (killed), and run next to a guest without a driver (silent).",
    run: |bench| run(bench, &LARGE),
};

/// For development.
pub(crate) const SMALL: Benchmark = Benchmark {
    names: &["turns", "turns-killed", "turns-silent"],
    kernel: Kernel::Test,
    settings: &[Setting::plain(|records| claims(records, "turns"))],
    by_default: false,
    answers: "The same as rotate with three guests of 1.5 GiB on a pool of 3 GiB, for a minute.",
    run: |bench| run(bench, &FEW),
};

/// A guest without anything that returns memory, and others.
const NONE: Contestant = Contestant::none(Device::VhostUser);
const REPORTING: Contestant = Contestant::new(By::Reporting, Device::VhostUser);

/// The kernel's messages about a process that it kills.
const OOM: &str = "invoked oom-killer|Out of memory";

/// The hosts of a benchmark.
struct Shape {
    /// The names of the rules, and their mechanisms.
    rules: &'static [(&'static str, Contestant)],
    guests: usize,
    memory: Size,
    pool: Size,
    /// What a guest uses all the time, in addition to its kernel.
    idle: Size,
    phases: &'static [Phase],
}

const LARGE: Shape = Shape {
    rules: &[
        ("none", NONE),
        ("reporting only", REPORTING),
        ("static", Contestant::OURS),
        ("Proxmox", Contestant::OURS),
        ("MoM", Contestant::OURS),
        (MANAGER, Contestant::OURS),
    ],
    guests: 6,
    memory: Size::gib(4),
    pool: Size::gib(9),
    idle: Size::mib(300),
    phases: &[
        phase("rotate", Event::None, 0, [12, 6], 6, [1536, 4]),
        phase("rotate-storm", Event::None, 4, [6, 6], 0, [512, 8]),
        phase("rotate-single", Event::None, 4, [1, 1], 0, [3200, 6]),
        phase("rotate-killed", Event::Kill, 10, [3, 3], 5, [512, 5]),
        phase("rotate-silent", Event::Silence, 10, [2, 5], 10, [512, 5]),
    ],
};

const FEW: Shape = Shape {
    rules: &[
        ("none", NONE),
        ("reporting only", REPORTING),
        ("Proxmox", Contestant::OURS),
        (MANAGER, Contestant::OURS),
    ],
    guests: 3,
    memory: Size::mib(1536),
    pool: Size::gib(3),
    idle: Size::mib(100),
    phases: &[
        phase("turns", Event::None, 0, [6, 3], 4, [800, 3]),
        phase("turns-killed", Event::Kill, 8, [1, 1], 0, [300, 3]),
        phase("turns-silent", Event::Silence, 8, [1, 2], 0, [250, 3]),
    ],
};

/// A phase with so many jobs in so many guests, and what a job uses for how long.
const fn phase(
    name: &'static str,
    event: Event,
    delay: u64,
    [jobs, guests]: [usize; 2],
    every: u64,
    [mib, hold]: [usize; 2],
) -> Phase {
    Phase {
        name,
        event,
        delay,
        jobs,
        guests,
        every,
        mib,
        hold: hold as u64,
    }
}

fn run(bench: &Bench<'_>, shape: &Shape) -> Result<()> {
    for &(name, contestant) in shape.rules {
        bench.rounds(&[(1, &[contestant])], |contestant| {
            measure(bench, shape, name, contestant)
        })?;
    }
    Ok(())
}

/// Runs all phases under a rule.
fn measure(
    bench: &Bench<'_>,
    shape: &Shape,
    name: &'static str,
    contestant: Contestant,
) -> Result<()> {
    let config = contestant.config(bench.config().memory(shape.memory), Size::default());
    let config = config.offer(&[Offer::DeflateOnOom]).expect(OOM);
    let programs = [config.tool("balloon-manager"), config.logs()];
    let numbered = |number| config.clone().name_suffix(&format!("/{number}"));
    let configs: Vec<_> = (1..=shape.guests).map(numbered).collect();
    vm::run_all(&configs, |guests| {
        bench.say(&format!("{name}: {} guests have booted", guests.len()));
        let idle = guests
            .iter()
            .map(|guest| prepare(guest, contestant, shape.idle));
        let idle: Vec<f64> = idle.collect::<Result<_>>()?;
        let host = Host::new(guests, shape.pool, name, programs);
        let seen = host.watch(|| {
            host.divide()?;
            let phases = shape.phases.iter().map(|phase| {
                bench.say(&format!("{name}: {}", phase.name));
                phase.run(&host, contestant.module())
            });
            phases.collect::<Result<Vec<_>>>()
        })?;
        keep(bench, shape, (name, contestant), &idle, &seen)
    })
}

/// Adds the results of all phases under a rule.
fn keep(
    bench: &Bench<'_>,
    shape: &Shape,
    (name, contestant): (&str, Contestant),
    idle: &[f64],
    (outcomes, seen): &(Vec<Outcome>, Seen),
) -> Result<()> {
    let divides = contestant == Contestant::OURS;
    let mut jobs = outcomes.iter().flat_map(|outcome| &outcome.jobs);
    ensure!(
        divides || jobs.all(|job| job.took < LIMIT.as_secs_f64()),
        "the machine is too slow: a job without a limit does not get its memory in {} s",
        LIMIT.as_secs()
    );
    let mut timeline = divides.then(|| seen.timeline(idle, outcomes));
    for (phase, outcome) in shape.phases.iter().zip(outcomes) {
        let memory = Size::mib(u64::try_from(phase.mib)?);
        let subject = Subject::new(phase.name, contestant, shape.memory, memory);
        let subject = match divides {
            true => subject.detail(name),
            false => subject,
        };
        let mut division = seen.division(shape.pool.as_mib() as f64, idle, outcome);
        division.timeline = timeline.take();
        for job in &outcome.jobs {
            let run = Run {
                took: Duration::from_secs_f64(job.took),
                division: Some(division.clone()),
                ..Run::default()
            };
            bench.add(subject.clone(), run);
        }
    }
    Ok(())
}

/// Prepares a guest. Returns what it uses.
fn prepare(guest: &Guest, contestant: Contestant, idle: Size) -> Result<f64> {
    // Under emulation, faulting in small pages takes several times as long.
    guest.write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
    guest.sh(&format!(
        "dd if=/dev/zero of=/idle bs=1M count={} 2>/dev/null",
        idle.as_mib()
    ))?;
    let available = guest.meminfo()?.available;
    if let Some(driver) = contestant.module() {
        guest.insmod(driver, &[])?;
        guest.balloon().poll_statistics(1)?;
    }
    Ok(guest.memory().saturating_sub(available).as_mib() as f64)
}

/// The bars for the manager. Those about time are for the jobs that take turns.
fn claims(records: &[Record], name: &str) -> Vec<Claim> {
    let ours = records.iter().filter(|record| is_by(record, MANAGER));
    let safe = ours.flat_map(|record| {
        let claim = |what, value, limit| {
            let what = format!("{}: {what}", record.name);
            Claim::new(what, value, limit)
        };
        record.division.iter().flat_map(move |division| {
            let most = division.most / division.pool;
            [
                claim("processes killed", division.kills as f64, 0.0),
                claim("most memory of the guests / pool", most, 1.0),
            ]
        })
    });
    let mut all: Vec<_> = safe.collect();
    all.extend(goals(records, name).into_iter().flatten());
    all
}

fn is_by(record: &Record, rule: &str) -> bool {
    record.detail.as_deref() == Some(rule)
}

fn goals(records: &[Record], name: &str) -> Option<[Claim; 5]> {
    let of_name: Vec<_> = records
        .iter()
        .filter(|record| record.name == name)
        .collect();
    let ours = of_name.iter().find(|record| is_by(record, MANAGER))?;
    let others = of_name
        .iter()
        .filter(|record| record.contestant() == Contestant::OURS && !is_by(record, MANAGER));
    let others = others.filter_map(|record| Some(record.division.as_ref()?.stalled));
    let best = others.fold(f64::INFINITY, f64::min);
    let division = ours.division.as_ref()?;
    let without = ours.base(records)?.seconds.values();
    let ratios = ours.seconds.values().iter().zip(without);
    let ratios: Samples = ratios.map(|(time, without)| time / without).collect();
    let waits = ours.waits(records)?.percentile(99);
    let footprint = division.mean / division.needed;
    let claim = |what: &str, value, limit| Claim::new(format!("{name}: {what}"), value, limit);
    Some([
        claim(
            "time of a job with balloon-manager / without a limit",
            ratios.median(),
            1.05,
        ),
        claim("seconds that a job waits for memory, 99 %", waits, 0.1),
        claim(
            "part of the time that processes wait for memory",
            division.stalled,
            best / 10.0,
        ),
        claim(
            "mean memory of the guests / what they need",
            footprint,
            1.25,
        ),
        claim(
            "changes of a guest's target in a minute",
            division.changes,
            12.0,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(driver: &str, rule: Option<&str>, seconds: [f64; 3], stalled: f64) -> Record {
        serde_json::from_value(serde_json::json!({
            "name": "rotate", "driver": driver, "device": "vhost-user", "detail": rule, "guest_mib": 4096,
            "amount_mib": 2048, "seconds": seconds,
            "division": {
                "pool": 1000.0, "most": 900.0, "mean": 600.0, "needed": 500.0, "above": 0.0, "kills": 0,
                "stalled": stalled, "changes": 13.0,
            },
        }))
        .unwrap()
    }

    #[test]
    fn jobs_are_compared_with_the_same_jobs() {
        let records = [
            record("none", None, [1.0, 2.0, 4.0], 0.0),
            record("reporting", None, [1.5, 2.0, 4.0], 0.0),
            record("rs", Some("static"), [3.0, 3.0, 3.0], 0.4),
            record("rs", Some("MoM"), [3.0, 3.0, 3.0], 0.2),
            record("rs", Some(MANAGER), [1.5, 2.5, 4.0], 0.01),
        ];
        let claims: Vec<_> = BENCHMARK
            .check(&records)
            .iter()
            .map(Claim::to_string)
            .collect();
        let expected = [
            "processes killed: 0.000000 (limit 0)",
            "most memory of the guests / pool: 0.9000 (limit 1)",
            "time of a job with balloon-manager / without a limit: 1.2500 (FAILED, the limit is 1.05)",
            "seconds that a job waits for memory, 99 %: 0.5000 (FAILED, the limit is 0.1)",
            "part of the time that processes wait for memory: 0.0100 (limit 0.02)",
            "mean memory of the guests / what they need: 1.2000 (limit 1.25)",
            "changes of a guest's target in a minute: 13.0000 (FAILED, the limit is 12)",
        ];
        assert_eq!(claims, expected.map(|claim| format!("rotate: {claim}")));
    }
}
