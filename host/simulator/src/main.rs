// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the same simulated guests under this project's policy and under the rules of others, and compares what they
//! lose: processes killed for lack of memory, and time spent waiting for it.

use std::ops::Range;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use balloon_policy::Pages;
use balloon_simulator::rules;
use clap::Parser;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

use crate::host::{Outcome, Shape, pool, run};

mod guest;
mod host;
mod load;

#[derive(Parser)]
#[command(
    about = "Compares rules that divide a host's memory, on simulated guests",
    max_term_width = 100
)]
struct Cli {
    /// The seeds of the hosts to simulate; each one has other guests
    #[arg(long, default_value = "0..100", value_name = "FROM..TO")]
    seeds: Seeds,
    /// How many guests a host has
    #[arg(long, default_value_t = 8)]
    vms: usize,
    /// For how many minutes of simulated time each host runs
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Let drivers leave as much to their guests as `virtio_balloon_rs` does by default, instead of 64 MiB
    #[arg(long)]
    default_reserves: bool,
    /// Let the pool have room for what drivers leave to their guests
    #[arg(long)]
    room: bool,
    /// Run only ours, and rules with this in their name
    #[arg(long)]
    only: Option<String>,
}

/// A range of seeds.
#[derive(Clone, Debug)]
struct Seeds(Range<u64>);

impl Seeds {
    fn count(&self) -> u64 {
        self.0.end - self.0.start
    }
}

impl FromStr for Seeds {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = text.split_once("..").and_then(|(first, end)| {
            let range = first.parse().ok()?..end.parse().ok()?;
            (range.start < range.end).then_some(Self(range))
        });
        numbers.ok_or("name at least one seed, as in 0..100")
    }
}

/// A difference in the stall that no user would notice, in parts per million of the time.
const NOTICEABLE: u64 = 1_000;

/// The part of the seeds in which ours has to be no worse than each other rule, in percent.
const BAR: u64 = 95;

/// The most that ours may use of the pool, in percent of what the oracle uses.
const MOST_FOOTPRINT: u64 = 125;

/// The most changes of a target for each VM and minute, in hundredths.
const MOST_CHANGES: u64 = 1_200;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let names: Vec<_> = chosen(cli.only.as_deref())
        .iter()
        .map(|rule| rule.name())
        .collect();
    let outcomes = simulate(&cli);
    let rows: Vec<Vec<Outcome>> = (0..names.len())
        .map(|rule| outcomes.iter().map(|(_, seed)| seed[rule]).collect())
        .collect();
    let pools: Vec<_> = outcomes.iter().map(|(pool, _)| *pool).collect();
    println!("{}", table(&cli, &names, &rows, &pools));
    let excesses = excesses(&cli, &names, &rows, &pools);
    for excess in &excesses {
        println!("Not good: {excess}.");
    }
    let mut good = excesses.is_empty();
    for (name, row) in names.iter().zip(&rows).skip(1) {
        if !is_of_others(name) {
            continue;
        }
        let (percent, worse) = compare(&rows[0], row);
        if percent < BAR {
            good = false;
            let seeds = worse.iter().map(|index| cli.seeds.0.start + index);
            println!(
                "Not good: no worse than {name} on {percent} % of the seeds only; worse on {:?}.",
                seeds.collect::<Vec<_>>()
            );
        }
    }
    match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// The limits that ours does not keep.
fn excesses(cli: &Cli, names: &[&str], rows: &[Vec<Outcome>], pools: &[Pages]) -> Vec<String> {
    let oracle = names.iter().position(|name| *name == "oracle");
    let used = footprint(&rows[0], pools);
    let most = oracle.map(|oracle| footprint(&rows[oracle], pools) * MOST_FOOTPRINT / 100);
    let footprint = most.filter(|&most| used > most).map(|most| {
        let (used, most) = (decimal(used, 100, " %"), decimal(most, 100, " %"));
        format!("ours uses {used} of the pool, more than {most}, which is {MOST_FOOTPRINT} % of the oracle's")
    });
    let changed = changes(cli, &rows[0]);
    let changes = (changed > MOST_CHANGES).then(|| {
        let (changed, most) = (decimal(changed, 100, ""), MOST_CHANGES / 100);
        format!(
            "ours changes targets {changed} times for each VM and minute, more than {most} times"
        )
    });
    footprint.into_iter().chain(changes).collect()
}

/// The mean part of the pool that VMs have, in hundredths of a percent.
fn footprint(row: &[Outcome], pools: &[Pages]) -> u64 {
    let parts = row.iter().zip(pools);
    let parts = parts.map(|(outcome, pool)| outcome.footprint * 10_000 / (*pool).max(1));
    parts.sum::<u64>() / row.len().max(1) as u64
}

/// The changes of a target for each VM and minute, in hundredths.
fn changes(cli: &Cli, row: &[Outcome]) -> u64 {
    let minutes = cli.minutes * cli.vms as u64 * cli.seeds.count();
    let changes = row.iter().map(|outcome| outcome.changes).sum::<u64>();
    changes * 100 / minutes.max(1)
}

/// Whether a rule is one of other projects, or none at all.
fn is_of_others(name: &str) -> bool {
    !name.starts_with("ours") && name != "oracle"
}

fn chosen(only: Option<&str>) -> Vec<Box<dyn rules::Rule>> {
    let mut rules = rules::all();
    // The others are compared with ours.
    let is_chosen = |name: &str| name == "ours" || only.is_none_or(|only| name.contains(only));
    rules.retain(|rule| is_chosen(rule.name()));
    rules
}

/// The pool and the outcomes of all rules, for each seed.
fn simulate(cli: &Cli) -> Vec<(Pages, Vec<Outcome>)> {
    let next = AtomicU64::new(cli.seeds.0.start);
    let (sender, receiver) = mpsc::channel();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= cli.seeds.0.end {
                        break;
                    }
                    let shape = Shape {
                        seed,
                        guests: cli.vms,
                        time: cli.minutes * 60_000,
                        default_reserves: cli.default_reserves,
                        room: cli.room,
                    };
                    let pool = pool(shape);
                    let outcomes = chosen(cli.only.as_deref())
                        .iter_mut()
                        .map(|rule| run(shape, pool, rule.as_mut()))
                        .collect();
                    // The receiver is there as long as this runs.
                    let _ = sender.send((seed, (pool, outcomes)));
                }
            });
        }
        drop(sender);
        let mut outcomes: Vec<_> = receiver.iter().collect();
        outcomes.sort_by_key(|(seed, _)| *seed);
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    })
}

/// On how many seeds, in percent, `ours` is no worse, and the first ones on which it is. To lose a VM is worse than to
/// lose any number of processes, and that is worse than to wait.
fn compare(ours: &[Outcome], other: &[Outcome]) -> (u64, Vec<u64>) {
    let loss = |outcome: &Outcome| (outcome.host_kills, outcome.kills);
    let is_worse = |ours: &Outcome, other: &Outcome| {
        loss(ours) > loss(other)
            || (loss(ours) == loss(other) && ours.stall > other.stall + NOTICEABLE)
    };
    let both = (0..).zip(ours.iter().zip(other));
    let worse: Vec<u64> = both
        .filter(|(_, (ours, other))| is_worse(ours, other))
        .map(|(index, _)| index)
        .collect();
    let all = ours.len().max(1) as u64;
    let percent = (all - worse.len() as u64) * 100 / all;
    (percent, worse.into_iter().take(10).collect())
}

fn table(cli: &Cli, names: &[&str], rows: &[Vec<Outcome>], pools: &[Pages]) -> Table {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header([
        "rule",
        "kills",
        "of them by the host",
        "stall, median",
        "99 %",
        "footprint",
        "exposed",
        "changes per VM and minute",
        "ours is no worse",
    ]);
    for (name, row) in names.iter().zip(rows) {
        let sum = |value: fn(&Outcome) -> u64| row.iter().map(value).sum::<u64>();
        let mut stalls: Vec<_> = row.iter().map(|outcome| outcome.stall).collect();
        stalls.sort_unstable();
        let at = |percent: usize| stalls[(stalls.len() - 1) * percent / 100];
        let ticks = cli.minutes * 600 * cli.seeds.count();
        table.add_row([
            (*name).to_owned(),
            sum(|outcome| outcome.kills).to_string(),
            sum(|outcome| outcome.host_kills).to_string(),
            decimal(at(50), 10_000, " %"),
            decimal(at(99), 10_000, " %"),
            format!("{} %", footprint(row, pools) / 100),
            decimal(
                sum(|outcome| outcome.exposed) * 1_000 / ticks.max(1),
                10,
                " %",
            ),
            decimal(changes(cli, row), 100, ""),
            format!("{} %", compare(&rows[0], row).0),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A number in units of 1/`unit`, with two digits after the point.
fn decimal(value: u64, unit: u64, suffix: &str) -> String {
    let hundredths = value * 100 / unit;
    format!("{}.{:02}{suffix}", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(seeds: Range<u64>) -> Cli {
        Cli {
            seeds: Seeds(seeds),
            vms: 8,
            minutes: 10,
            default_reserves: false,
            room: false,
            only: None,
        }
    }

    #[test]
    fn seeds_are_ranges() {
        assert_eq!("3..9".parse::<Seeds>().map(|seeds| seeds.0), Ok(3..9));
        for wrong in ["", "3", "3..", "9..3", "3..3", "a..b"] {
            assert!(wrong.parse::<Seeds>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_lost_vm_is_worse_than_lost_processes() {
        let outcome = |host_kills, kills, stall| Outcome {
            host_kills,
            kills,
            stall,
            ..Outcome::default()
        };
        let percent = |ours, other| compare(&[ours], &[other]).0;
        assert_eq!(percent(outcome(0, 9, 9), outcome(1, 1, 0)), 100);
        assert_eq!(percent(outcome(0, 2, 0), outcome(0, 1, 9)), 0);
        assert_eq!(percent(outcome(0, 1, NOTICEABLE), outcome(0, 1, 0)), 100);
        assert_eq!(percent(outcome(0, 1, NOTICEABLE + 1), outcome(0, 1, 0)), 0);
    }

    #[test]
    fn limits_are_those_of_ours() {
        let cli = cli(0..2);
        let count = |footprint, changes| {
            let outcome = |footprint, changes| Outcome {
                footprint,
                changes,
                ..Outcome::default()
            };
            // Two hosts of eight VMs for ten minutes.
            let ours = vec![outcome(footprint, 0), outcome(footprint, changes)];
            let others = vec![outcome(400, 9_999), outcome(400, 9_999)];
            let rows = [ours, others];
            excesses(&cli, &["ours", "oracle"], &rows, &[1_000, 1_000]).len()
        };
        assert_eq!(count(500, 1_920), 0);
        assert_eq!(count(501, 0), 1);
        assert_eq!(count(0, 1_922), 1);
        assert_eq!(count(501, 1_922), 2);
    }

    #[test]
    fn the_policy_loses_fewer_processes_than_any_other_rule() {
        let outcomes = simulate(&cli(0..4));
        let kills = |rule: usize| {
            outcomes
                .iter()
                .map(|(_, seed)| seed[rule].kills)
                .sum::<u64>()
        };
        let names: Vec<_> = chosen(None).iter().map(|rule| rule.name()).collect();
        for (rule, name) in names.iter().enumerate() {
            assert!(kills(0) <= kills(rule) || !is_of_others(name), "{name}");
        }
        assert!(outcomes.iter().all(|(_, seed)| seed[0].host_kills == 0));
    }

    #[test]
    fn a_rule_that_is_chosen_is_compared_with_ours() {
        let names = |only| -> Vec<_> {
            let rules = chosen(Some(only));
            rules.iter().map(|rule| rule.name()).collect()
        };
        assert_eq!(names("MoM"), ["ours", "MoM"]);
        assert_eq!(names("no such rule"), ["ours"]);
    }

    #[test]
    fn a_seed_gives_the_same_each_time() {
        let kept = |cli: &Cli| format!("{:?}", simulate(cli));
        let cli = Cli {
            minutes: 2,
            ..cli(5..7)
        };
        assert_eq!(kept(&cli), kept(&cli));
    }
}
