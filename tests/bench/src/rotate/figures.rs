// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures about the host's memory. Times are in seconds, and memory is in MiB.

use super::host::{Seen, Series};
use super::phase::Outcome;
use crate::division::{Division, Timeline, Track};

/// What a guest needs in addition to what it uses.
const HEADROOM: f64 = 128.0;

/// The time between two points of a plot.
const STEP: f64 = 0.5;

fn between(series: &Series, from: f64, to: f64) -> impl Iterator<Item = &[f64]> {
    let is_in = move |row: &&(f64, Vec<f64>)| (from..to).contains(&row.0);
    series.iter().filter(is_in).map(|(_, values)| &values[..])
}

/// The last values before a time.
fn last(series: &Series, at: f64) -> Option<&[f64]> {
    let row = series.iter().rfind(|(when, _)| *when < at)?;
    Some(&row.1)
}

/// The largest value, without a fraction.
fn most(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max).round()
}

fn sum(values: &[f64]) -> f64 {
    values.iter().sum()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// What a guest used at a time: `idle` without a job, and the memory of its jobs.
fn used(outcomes: &[Outcome], guest: usize, idle: f64, at: f64) -> f64 {
    let jobs = outcomes.iter().flat_map(|outcome| &outcome.jobs);
    let jobs = jobs.filter(|job| job.guest == guest);
    idle + jobs.map(|job| job.used(at)).sum::<f64>()
}

impl Seen {
    /// How a pool was divided in a phase between guests that use so much without jobs.
    pub(super) fn division(&self, pool: f64, idle: &[f64], outcome: &Outcome) -> Division {
        let (from, to) = (outcome.from, outcome.to);
        let all: Vec<_> = between(&self.resident, from, to).map(sum).collect();
        let needed = self
            .resident
            .iter()
            .filter(|(at, _)| (from..to).contains(at));
        let needed = needed.map(|(at, _)| {
            let of =
                |(guest, &idle)| used(std::slice::from_ref(outcome), guest, idle, *at) + HEADROOM;
            idle.iter().enumerate().map(of).sum()
        });
        let needed: Vec<f64> = needed.collect();
        let grants: Vec<_> = between(&self.granted, from, to).collect();
        let changes = grants
            .windows(2)
            .flat_map(|pair| pair[0].iter().zip(pair[1]));
        let changes = changes.filter(|(before, after)| before != after).count();
        let above = all.iter().filter(|&&one| one > pool).count();
        let (guests, time) = (idle.len() as f64, to - from);
        Division {
            pool,
            most: all.iter().copied().fold(0.0, f64::max),
            mean: mean(&all),
            needed: mean(&needed),
            above: above as f64 / all.len().max(1) as f64,
            kills: outcome.kills,
            stalled: outcome.stalled / guests / time,
            changes: changes as f64 * 60.0 / guests / time,
            timeline: None,
        }
    }

    /// All phases over time, from the first one on.
    pub(super) fn timeline(&self, idle: &[f64], outcomes: &[Outcome]) -> Timeline {
        let begin = outcomes.first().map_or(0.0, |first| first.from);
        let end = outcomes.last().map_or(0.0, |last| last.to);
        let phases = outcomes
            .iter()
            .map(|outcome| (outcome.from - begin, outcome.name.to_owned()));
        let mut line = Timeline {
            step: STEP,
            phases: phases.collect(),
            guests: vec![Track::default(); idle.len()],
            all: Vec::new(),
        };
        let times = (0..).map(|number: u32| begin + f64::from(number) * STEP);
        for at in times.take_while(|at| *at < end) {
            let mut rows: Vec<_> = between(&self.resident, at, at + STEP).collect();
            if rows.is_empty() {
                // The host was busy.
                rows.extend(last(&self.resident, at));
            }
            let grants = last(&self.granted, at + STEP);
            line.all.push(most(rows.iter().map(|row| sum(row))));
            for (guest, track) in line.guests.iter_mut().enumerate() {
                track.resident.push(most(rows.iter().map(|row| row[guest])));
                track
                    .granted
                    .push(grants.map_or(0.0, |grants| grants[guest]));
                track
                    .used
                    .push(used(outcomes, guest, idle[guest], at).round());
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotate::phase::Job;

    #[test]
    fn a_phase_has_its_own_figures() {
        let row = |at: u32, memory: f64| (f64::from(at), vec![memory, 100.0]);
        let seen = Seen {
            resident: vec![row(0, 900.0), row(10, 300.0), row(11, 500.0)],
            granted: vec![row(0, 900.0), row(10, 400.0), row(11, 600.0)],
        };
        let outcome = Outcome {
            name: "rotate",
            from: 10.0,
            to: 40.0,
            kills: 0,
            stalled: 6.0,
            jobs: vec![Job {
                guest: 0,
                used: vec![(10.5, 100.0), (12.0, 200.0), (20.0, 0.0)],
                took: 2.0,
            }],
        };
        let division = seen.division(550.0, &[50.0, 50.0], &outcome);
        let Division {
            most,
            mean,
            above,
            needed,
            stalled,
            changes,
            ..
        } = division;
        assert_eq!((most, mean, above), (600.0, 500.0, 0.5));
        assert_eq!((stalled, changes), (0.1, 1.0));
        // The job has begun at the second of two samples.
        assert_eq!(needed, 2.0 * (50.0 + HEADROOM) + 50.0);
        let timeline = seen.timeline(&[50.0, 50.0], &[outcome]);
        assert_eq!(timeline.phases, [(0.0, "rotate".to_owned())]);
        let guest = &timeline.guests[0];
        assert_eq!(timeline.all.len(), 60);
        assert_eq!(guest.used[..5], [50.0, 150.0, 150.0, 150.0, 250.0]);
        assert_eq!(guest.granted[..3], [400.0, 400.0, 600.0]);
        assert_eq!(guest.resident[1..3], [300.0, 500.0]);
        assert_eq!(timeline.all.last(), Some(&600.0));
    }
}
