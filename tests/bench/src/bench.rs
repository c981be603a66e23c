// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A benchmark, and what it runs with.

use std::cell::RefCell;

use anyhow::Result;
use vm::{Accel, Artifacts, Config, Kernel};

use crate::claim::Claim;
use crate::contestant::Contestant;
use crate::record::{Record, Run, Subject};

/// A benchmark.
pub struct Benchmark {
    /// The names of its records. The records of one benchmark come from the same guests.
    pub names: &'static [&'static str],
    /// The kernel of its guests.
    pub kernel: Kernel,
    /// The question that it answers.
    pub answers: &'static str,
    /// Does it.
    pub run: fn(&Bench) -> Result<()>,
    /// The claims about the results, which are the records with its names.
    pub(crate) claims: fn(&[Record]) -> Vec<Claim>,
}

impl Benchmark {
    /// The claims about its results among `records`.
    pub fn check(&self, records: &[Record]) -> Vec<Claim> {
        let is_result = |record: &&Record| self.names.contains(&&*record.name);
        let results: Vec<_> = records.iter().filter(is_result).cloned().collect();
        (self.claims)(&results)
    }
}

/// What a benchmark runs with, and where its results go.
pub struct Bench<'a> {
    config: Config,
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
        Self {
            config: Config::new(artifacts, &name).accel(accel).verbose(verbose),
            watch,
            keep,
            series: RefCell::default(),
        }
    }

    /// The configuration that its guests start from.
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// Runs all contestants in turn, those of each group as many times as the group says.
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
            for &(runs, contestants) in groups.iter().filter(|&&(runs, _)| round <= runs) {
                for &contestant in contestants {
                    (self.watch)(&format!("run {round} of {runs}: {contestant}"));
                    each(contestant)?;
                }
            }
            (self.keep)(&self.records())?;
        }
        Ok(())
    }

    /// Adds a run to those of the same subject.
    pub fn add(&self, subject: Subject, run: Run) {
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
