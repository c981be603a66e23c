// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A benchmark, and what it runs with.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use anyhow::Result;
use vm::{Accel, Artifacts, Config, Kernel, Zeroing};

use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::machine;
use crate::record::{Record, Run, Subject};

/// A benchmark.
pub struct Benchmark {
    /// The names of its records. The records of one benchmark come from the same guests.
    pub names: &'static [&'static str],
    /// The kernel of its guests.
    pub kernel: Kernel,
    /// The settings of that kernel.
    pub(crate) settings: &'static [Setting],
    /// It runs also if it is not asked for by its name.
    pub by_default: bool,
    /// The question that it answers.
    pub answers: &'static str,
    /// Does it.
    pub run: fn(&Bench) -> Result<()>,
}

impl Benchmark {
    /// The claims about its results among `records`.
    pub fn check(&self, records: &[Record]) -> Vec<Claim> {
        let of = |setting: &Setting| {
            let zeroing = setting.zeroing;
            let is_result =
                |record: &&Record| record.zeroing == zeroing && self.names.contains(&&*record.name);
            let results: Vec<_> = records.iter().filter(is_result).cloned().collect();
            let claims = (setting.claims)(&results).into_iter();
            claims.map(move |claim| claim.with(zeroing))
        };
        self.settings.iter().flat_map(of).collect()
    }
}

/// The claims about records.
type Claims = fn(&[Record]) -> Vec<Claim>;

/// For settings without a goal.
pub(crate) fn no_claims(_: &[Record]) -> Vec<Claim> {
    Vec::new()
}

/// A setting of the guests' kernel.
pub struct Setting {
    zeroing: Zeroing,
    /// The most runs of a contestant.
    most_runs: usize,
    /// The claims about the results with this setting.
    claims: Claims,
}

impl Setting {
    /// The kernel does not zero memory that it allocates.
    pub(crate) const fn plain(claims: Claims) -> Self {
        Self {
            zeroing: Zeroing::Off,
            most_runs: usize::MAX,
            claims,
        }
    }

    /// The kernel zeroes it.
    pub(crate) const fn zeroing(most_runs: usize, claims: Claims) -> Self {
        Self {
            zeroing: Zeroing::On,
            most_runs,
            claims,
        }
    }

    /// The kernel has its own setting.
    pub(crate) const fn own(claims: Claims) -> Self {
        Self {
            zeroing: Zeroing::Own,
            most_runs: usize::MAX,
            claims,
        }
    }
}

/// What a benchmark runs with, and where its results go.
pub struct Bench<'a> {
    config: Config,
    settings: &'static [Setting],
    zeroing: Cell<Zeroing>,
    /// The state of the machine before the present contestant.
    machine: Cell<Option<Duration>>,
    watch: &'a dyn Fn(&str),
    keep: &'a dyn Fn(&[Record]) -> Result<()>,
    series: RefCell<Vec<(Subject, Vec<Run>)>>,
}

impl<'a> Bench<'a> {
    /// A bench for one benchmark. It reports its progress through `watch`, and stores the results after each
    /// round.
    pub fn new(
        benchmark: &Benchmark,
        artifacts: &Artifacts,
        accel: Accel,
        verbose: bool,
        watch: &'a dyn Fn(&str),
        keep: &'a dyn Fn(&[Record]) -> Result<()>,
    ) -> Self {
        let name = format!("bench-{}", benchmark.names[0]);
        let config = Config::new(artifacts, &name).accel(accel).verbose(verbose);
        Self {
            config: config.using_memory(),
            settings: benchmark.settings,
            zeroing: Cell::default(),
            machine: Cell::default(),
            watch,
            keep,
            series: RefCell::default(),
        }
    }

    /// The configuration that its guests start from, with the current setting.
    pub fn config(&self) -> Config {
        self.config.clone().zeroing(self.zeroing.get())
    }

    /// Whether the guests' kernel zeroes memory because of the current setting.
    pub(crate) fn is_zeroing(&self) -> bool {
        self.zeroing.get() == Zeroing::On
    }

    /// Runs all contestants in turn with each setting, those of each group as many times as the group says.
    ///
    /// # Errors
    ///
    /// The first error of a contestant, or the results cannot be stored.
    pub fn rounds(
        &self,
        groups: &[(usize, &[Contestant])],
        mut each: impl FnMut(Contestant) -> Result<()>,
    ) -> Result<()> {
        let rounds = groups.iter().map(|&(runs, _)| runs).max();
        for round in 1..=rounds.unwrap_or(0) {
            for setting in self.settings {
                let is_due = |runs: usize| round <= runs.min(setting.most_runs);
                self.zeroing.set(setting.zeroing);
                for &(runs, contestants) in groups.iter().filter(|&&(runs, _)| is_due(runs)) {
                    for &contestant in contestants {
                        let kernel = setting.zeroing.parameter().unwrap_or("own setting");
                        (self.watch)(&format!("run {round} of {runs}: {contestant}, {kernel}"));
                        self.machine.set(Some(machine::write_memory()?));
                        each(contestant)?;
                    }
                }
            }
            (self.keep)(&self.records())?;
        }
        Ok(())
    }

    /// Reports progress within a round.
    pub(crate) fn say(&self, words: &str) {
        (self.watch)(words);
    }

    /// Adds a run to those of the same subject.
    pub fn add(&self, subject: Subject, run: Run) {
        let subject = subject.zeroing(self.zeroing.get());
        let machine = self.machine.get();
        let run = Run { machine, ..run };
        let mut series = self.series.borrow_mut();
        match series.iter_mut().find(|(other, _)| *other == subject) {
            Some((_, runs)) => runs.push(run),
            None => series.push((subject, vec![run])),
        }
    }

    /// The records.
    pub fn records(&self) -> Vec<Record> {
        let series = self.series.borrow();
        series
            .iter()
            .map(|(subject, runs)| Record::new(subject, runs))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idle::IDLE;

    #[test]
    fn each_setting_has_its_own_claims() {
        let record = |driver: &str, zeroing: &str, seconds: f64| -> Record {
            serde_json::from_value(serde_json::json!({
                "name": "inflate-idle", "driver": driver, "device": "vhost-user", "zeroing": zeroing,
                "guest_mib": 8192, "amount_mib": 7168, "seconds": [seconds],
            }))
            .unwrap()
        };
        let records = [
            record("c", "off", 2.0),
            record("rs", "off", 1.0),
            record("c", "on", 4.0),
            record("rs", "on", 1.0),
        ];
        assert_eq!(records[3].base(&records), Some(&records[2]));
        let claims: Vec<_> = IDLE.check(&records).iter().map(Claim::to_string).collect();
        let what = "inflate-idle: time of this driver, vhost-user / time of C driver, vhost-user";
        assert_eq!(
            claims,
            [
                format!("{what}: 0.5000 (FAILED, the limit is 0.005)"),
                format!("{what}, zeroing: 0.2500 (FAILED, the limit is 0.02)"),
            ]
        );
    }
}
