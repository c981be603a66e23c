// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Phases: each has an event and jobs in guests.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use vm::{Driver, Guest, Load};

use super::host::Host;

/// A job that has not all of its memory by then has failed.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// How often a job is watched.
const POLL: Duration = Duration::from_millis(20);

/// What happens when a phase begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// Nothing.
    None,
    /// The program that divides memory is killed.
    Kill,
    /// It is started again, and the last guest loses its driver.
    Silence,
}

/// A phase. Job after job is for the next guest. Times are in seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    pub(super) event: Event,
    /// The time from the event to the first job.
    pub(super) delay: u64,
    pub(super) jobs: usize,
    /// How many guests have jobs.
    pub(super) guests: usize,
    /// The time from the beginning of a job to that of the next one.
    pub(super) every: u64,
    /// What a job uses, in MiB, and for how long.
    pub(super) mib: usize,
    pub(super) hold: u64,
}

/// A job. Times are in seconds, and memory is in MiB.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) guest: usize,
    /// What it used from some times on.
    pub(super) used: Vec<(f64, f64)>,
    /// How long it took to use its memory.
    pub(super) took: f64,
}

impl Job {
    /// What it used at a time.
    pub(super) fn used(&self, at: f64) -> f64 {
        let before = self.used.iter().rfind(|(when, _)| *when <= at);
        before.map_or(0.0, |(_, mib)| *mib)
    }
}

/// What happened in a phase.
pub(super) struct Outcome {
    pub(super) name: &'static str,
    pub(super) from: f64,
    pub(super) to: f64,
    /// Those of the first guest, then those of the next one.
    pub(super) jobs: Vec<Job>,
    /// Processes that the guests killed.
    pub(super) kills: u64,
    /// The time for which processes of the guests waited for memory.
    pub(super) stalled: f64,
}

impl Phase {
    pub(super) fn run(&self, host: &Host<'_>, driver: Option<Driver>) -> Result<Outcome> {
        let (kills, stalled) = losses(host)?;
        let from = host.now();
        match self.event {
            Event::None => {}
            Event::Kill => host.kill(),
            Event::Silence => {
                host.begin(self.name)?;
                if let (Some(guest), Some(driver)) = (host.guests.last(), driver) {
                    guest.rmmod(driver)?;
                }
            }
        }
        let jobs = thread::scope(|scope| {
            let start = |guest| scope.spawn(move || self.jobs_of(host, guest, from));
            let guests: Vec<_> = (0..self.guests).map(start).collect();
            let ended = guests
                .into_iter()
                .map(|guest| guest.join().expect("a thread does not panic"));
            ended.collect::<Result<Vec<_>>>()
        })?;
        let jobs = jobs.concat();
        let to = host.now();
        let after = losses(host)?;
        Ok(Outcome {
            name: self.name,
            from,
            to,
            jobs,
            kills: after.0 - kills,
            stalled: after.1 - stalled,
        })
    }

    /// The jobs of a guest, one after the other, in a phase that has begun at `from`.
    fn jobs_of(&self, host: &Host<'_>, guest: usize, from: f64) -> Result<Vec<Job>> {
        let numbers = (guest..self.jobs).step_by(self.guests);
        let jobs = numbers.map(|number| {
            let due = from + self.delay as f64 + (self.every * u64::try_from(number)?) as f64;
            thread::sleep(Duration::from_secs_f64((due - host.now()).max(0.0)));
            self.job(host, guest)
        });
        jobs.collect()
    }

    fn job(&self, host: &Host<'_>, guest: usize) -> Result<Job> {
        let start = host.now();
        let load = host.guests[guest].start_load(Load::Hog { mib: self.mib })?;
        let mut used = Vec::new();
        let took = loop {
            let (status, now) = (load.status()?, host.now());
            used.push((now, status.progress.mib as f64));
            if status.progress.mib >= self.mib {
                thread::sleep(Duration::from_secs(self.hold));
                break now - start;
            }
            if status.exit.is_some() || now - start >= LIMIT.as_secs_f64() {
                break LIMIT.as_secs_f64();
            }
            thread::sleep(POLL);
        };
        // It may have been killed.
        let _ = load.stop();
        used.push((host.now(), 0.0));
        Ok(Job { guest, used, took })
    }
}

/// Processes that the guests have killed, and the seconds for which others waited for memory.
fn losses(host: &Host<'_>) -> Result<(u64, f64)> {
    let each = |guest: &&Guest| Ok((guest.vmstat("oom_kill")?, stalled(guest)?));
    let each: Vec<(u64, f64)> = host.guests.iter().map(each).collect::<Result<_>>()?;
    Ok((
        each.iter().map(|(kills, _)| kills).sum(),
        each.iter().map(|(_, stalled)| stalled).sum(),
    ))
}

/// The seconds for which some process of a guest waited for memory.
fn stalled(guest: &Guest) -> Result<f64> {
    let text = guest.read_file("/proc/pressure/memory")?;
    let total = text
        .lines()
        .next()
        .and_then(|some| some.rsplit_once("total="));
    let (_, microseconds) = total.context("the guest's kernel does not count stalls")?;
    Ok(microseconds.parse::<f64>()? / 1e6)
}
