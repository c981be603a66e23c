// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks: runs them, and stores, shows and plots the results.

use std::io::{IsTerminal, stderr};

use anyhow::{Context, Result, ensure};
use benchmarks::{BENCHMARKS, Bench, Benchmark, Claim, Record};
use vm::{Artifacts, Kernel};

use crate::cli::Guests;
use crate::kernel;
use crate::places::Places;
use crate::progress::Phase;
use crate::setup;

mod docs;
mod plots;
mod readme;
mod results;
mod tables;
mod timelines;

use results::{all_names, directory, keep, load};

/// Runs the benchmarks with `only` in one of their names, or those that run by default. Returns whether all claims hold.
pub(crate) fn run(only: Option<&str>, guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let _lock = kernel::lock_checkout(&places)?;
    let wanted: Vec<_> = BENCHMARKS
        .iter()
        .filter(|benchmark| {
            only.map_or(benchmark.by_default, |only| {
                benchmark.names.iter().any(|name| name.contains(only))
            })
        })
        .collect();
    ensure!(
        !wanted.is_empty(),
        "no benchmark has '{}' in its name; there are {}",
        only.unwrap_or_default(),
        all_names().join(", ")
    );
    let kernels: Vec<_> = wanted.iter().map(|benchmark| benchmark.kernel).collect();
    let mut prepared: Vec<(Kernel, Artifacts)> = Vec::new();
    for kernel in kernels {
        if !prepared.iter().any(|&(this, _)| this == kernel) {
            prepared.push((kernel, setup::prepare(&places, kernel)?));
        }
    }
    let mut good = true;
    let mut failed: Vec<Claim> = Vec::new();
    for benchmark in wanted {
        let artifacts = prepared
            .iter()
            .find(|(kernel, _)| *kernel == benchmark.kernel);
        let (_, artifacts) = artifacts.context("each kernel was prepared")?;
        let records = match run_one(&places, benchmark, artifacts, guests) {
            Ok(records) => records,
            Err(error) => {
                println!("{}: {error:#}", benchmark.names.join(", "));
                good = false;
                continue;
            }
        };
        let all = load(&places)?;
        plots::draw(&directory(&places), &all)?;
        timelines::draw(&directory(&places), &all)?;
        tables::print(benchmark, &records);
        let claims = benchmark.check(&records).into_iter();
        failed.extend(claims.filter(|claim| !claim.holds()));
    }
    for claim in &failed {
        println!("{claim}");
    }
    println!("results and plots are in {}", directory(&places).display());
    Ok(good && failed.is_empty())
}

/// Writes docs/performance.md, its plots and the README's table from the stored results.
pub(crate) fn write_docs(guests: Guests) -> Result<bool> {
    let places = Places::find()?;
    let records = load(&places).context("there are no results; run make bench first")?;
    docs::write(&places, &records, guests.accel())?;
    Ok(true)
}

fn run_one(
    places: &Places,
    benchmark: &Benchmark,
    artifacts: &Artifacts,
    guests: Guests,
) -> Result<Vec<Record>> {
    let name = benchmark.names.join(", ");
    let phase = Phase::start(&name, None);
    let watch = |words: &str| {
        phase.say(words);
        if !stderr().is_terminal() {
            eprintln!("{name}: {words}");
        }
    };
    // After each round, so that completed rounds are not lost.
    let keep = |records: &[Record]| keep(places, benchmark, records);
    let outcome = {
        let (accel, verbose) = (guests.accel(), guests.verbose);
        let bench = Bench::new(benchmark, artifacts, accel, verbose, &watch, &keep);
        (benchmark.run)(&bench).map(|()| bench.records())
    };
    phase.finish();
    outcome
}
