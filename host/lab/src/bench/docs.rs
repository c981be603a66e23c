// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results in the documentation.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use benchmarks::{BENCHMARKS, Benchmark, Record};
use procfs::{CpuInfo, Current, Meminfo};
use vm::{Accel, Kernel, Size};

use super::plots::{self, Plot};
use super::results::{directory, of};
use super::tables;
use crate::kernel;
use crate::places::Places;

/// The introduction of the document.
const INTRODUCTION: &str = include_str!("introduction.md");

/// Writes docs/performance.md and the plots that it shows.
///
/// # Errors
///
/// A file cannot be written, or a property of the machine is not available.
pub(super) fn write(places: &Places, records: &[Record], accel: Accel) -> Result<()> {
    let docs = places.checkout.join("docs");
    let to = docs.join("plots");
    fs::create_dir_all(&to)?;
    plots::draw(&directory(places), records)?;
    let mut text = INTRODUCTION.replace("MACHINE", &machine(places, accel)?);
    for benchmark in BENCHMARKS {
        write_one(&mut text, benchmark, records)?;
        for (name, _) in shown(benchmark, records) {
            let file = format!("{name}.svg");
            fs::copy(directory(places).join(&file), to.join(&file))
                .with_context(|| format!("copying {file}"))?;
        }
    }
    fs::write(docs.join("performance.md"), text)?;
    Ok(())
}

/// Adds the results of a benchmark.
fn write_one(text: &mut String, benchmark: &Benchmark, records: &[Record]) -> Result<()> {
    let mut all = of(benchmark, records).peekable();
    if all.peek().is_none() {
        return Ok(());
    }
    writeln!(
        text,
        "\n## {}\n\n{}",
        benchmark.names.join(", "),
        benchmark.answers
    )?;
    for (name, of_name) in all {
        let (amount, commits) = (tables::amount(&of_name), tables::commits(&of_name));
        writeln!(text, "\n`{name}`, {amount}{commits}:\n")?;
        writeln!(text, "{}", tables::markdown(&of_name, records))?;
    }
    let claims = benchmark.check(records);
    if !claims.is_empty() {
        writeln!(text)?;
    }
    for claim in claims {
        writeln!(text, "- {claim}")?;
    }
    for (name, shows) in shown(benchmark, records) {
        writeln!(text, "\n![{shows}](plots/{name}.svg)")?;
    }
    Ok(())
}

/// The plots for which there are results of a benchmark. A plot of several benchmarks belongs to the last of them.
fn shown(benchmark: &Benchmark, records: &[Record]) -> Vec<(&'static str, &'static str)> {
    let (name, shows, of) = plots::SCALE;
    let last_of = |plot: &Plot| {
        let with_results = |name: &&str| records.iter().any(|record| record.name == *name);
        plot.names().filter(with_results).last()
    };
    plots::PLOTS
        .iter()
        .filter(|plot| last_of(plot).is_some_and(|last| benchmark.names.contains(&last)))
        .map(|plot| (plot.name, plot.shows))
        .chain(
            (benchmark.names == [of] && records.iter().any(|record| record.name == of))
                .then_some((name, shows)),
        )
        .collect()
}

/// The environment of the results.
fn machine(places: &Places, accel: Accel) -> Result<String> {
    let cpuinfo = CpuInfo::current()?;
    let processors = cpuinfo.num_cores();
    let model = cpuinfo.model_name(0);
    let model = model.context("the processors have no name")?;
    let memory = Size::bytes(Meminfo::current()?.mem_total).as_mib() as f64 / 1024.0;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let qemu = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()?;
    let qemu = String::from_utf8(qemu.stdout)?;
    let qemu = qemu.lines().next().context("QEMU has no version")?;
    let qemu = qemu.trim_start_matches("QEMU emulator version ");
    let tree = kernel::build(places, Kernel::Test)?;
    let guest = release(&tree.path)?;
    let how = match accel {
        Accel::Kvm => "KVM",
        Accel::Tcg => "TCG, which emulates the guests' processors",
    };
    Ok(format!(
        "{processors} x {model}, {memory:.0} GiB of memory, Linux {}; QEMU {qemu} with {how}; guests with two processors \
         and Linux {guest}",
        host.trim_end()
    ))
}

/// The version of a kernel that was built.
fn release(tree: &Path) -> Result<String> {
    let release = fs::read_to_string(tree.join("include/config/kernel.release"))?;
    Ok(release.trim_end().to_owned())
}
