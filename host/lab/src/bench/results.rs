// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results, in a file.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use benchmarks::{BENCHMARKS, Benchmark, Record};

use crate::kernel;
use crate::places::Places;

/// Replaces the records of a benchmark. The new ones are stamped with the commit.
pub(super) fn keep(places: &Places, benchmark: &Benchmark, records: &[Record]) -> Result<()> {
    let old = match results(places).exists() {
        true => load(places)?,
        false => Vec::new(),
    };
    let others = old
        .into_iter()
        .filter(|record| !benchmark.names.contains(&&*record.name));
    let commit = commit(places);
    let new = records.iter().map(|record| Record {
        commit: commit.clone(),
        ..record.clone()
    });
    let mut all: Vec<Record> = others.chain(new).collect();
    let names = all_names();
    all.sort_by_key(|record| names.iter().position(|name| *name == record.name));
    let json = serde_json::to_string_pretty(&all)?;
    fs::create_dir_all(directory(places))?;
    fs::write(results(places), json + "\n")?;
    Ok(())
}

pub(super) fn load(places: &Places) -> Result<Vec<Record>> {
    let path = results(places);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no results", path.display()))
}

fn commit(places: &Places) -> Option<String> {
    let mut git = Command::new("git");
    git.args([
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=12",
        "--dirty=+",
    ]);
    let commit = kernel::output(git.current_dir(&places.checkout)).ok()?;
    Some(commit.trim_end().to_owned())
}

/// The names of all records, in the order of the benchmarks.
pub(super) fn all_names() -> Vec<&'static str> {
    let names = BENCHMARKS.iter().flat_map(|benchmark| benchmark.names);
    names.copied().collect()
}

pub(super) fn directory(places: &Places) -> PathBuf {
    places.build().join("bench")
}

fn results(places: &Places) -> PathBuf {
    directory(places).join("results.json")
}

/// Those of a benchmark.
pub(super) fn of<'a>(
    benchmark: &'a Benchmark,
    records: &'a [Record],
) -> impl Iterator<Item = (&'static str, Vec<&'a Record>)> {
    benchmark.names.iter().filter_map(|&name| {
        let records: Vec<_> = records
            .iter()
            .filter(|record| record.name == name)
            .collect();
        (!records.is_empty()).then_some((name, records))
    })
}
