// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results in the documentation.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use benchmarks::{BENCHMARKS, Benchmark, Contestant, Record, find};
use procfs::{CpuInfo, Current, Meminfo};
use vm::{Accel, Kernel, Size};

use super::plots::{self, Plot};
use super::readme::{self, GUESTS};
use super::results::{directory, of};
use super::{tables, timelines};
use crate::kernel;
use crate::places::Places;

/// The introduction of the document.
const INTRODUCTION: &str = include_str!("introduction.md");

/// The columns of a line.
const COLUMNS: usize = 120;

/// Writes docs/performance.md and the plots that it shows, and the README's table.
///
/// # Errors
///
/// A file cannot be written, or a property of the machine is not available.
pub(super) fn write(places: &Places, records: &[Record], accel: Accel) -> Result<()> {
    let docs = places.checkout.join("docs");
    let to = docs.join("plots");
    fs::create_dir_all(&to)?;
    plots::draw(&directory(places), records)?;
    timelines::draw(&directory(places), records)?;
    let cores = CpuInfo::current()?.num_cores();
    let mut text = INTRODUCTION
        .replace("SUMMARY", summary(records, cores, accel).trim_end())
        .replace("MACHINE", &machine(places, accel)?);
    for benchmark in BENCHMARKS {
        write_one(&mut text, benchmark, records)?;
        for (name, _) in shown(benchmark, records) {
            let file = format!("{name}.svg");
            fs::copy(directory(places).join(&file), to.join(&file))
                .with_context(|| format!("copying {file}"))?;
        }
    }
    fs::write(docs.join("performance.md"), text)?;
    let file = places.checkout.join("README.md");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, readme::with_table(&text, records)?)?;
    Ok(())
}

/// Five lines to quote: the subject, the baseline, the ratios, the machine, and what is not good yet.
fn summary(records: &[Record], cores: usize, accel: Accel) -> String {
    let ratios: Vec<_> = GUESTS
        .iter()
        .filter_map(|&(kernel, names)| how_much(records, kernel, names))
        .collect();
    let runs = match accel {
        Accel::Kvm => "runs with KVM.",
        Accel::Tcg => "emulates (TCG): quote the ratios, not the times.",
    };
    let claims: Vec<_> = BENCHMARKS
        .iter()
        .flat_map(|benchmark| benchmark.check(records))
        .collect();
    let failed: Vec<_> = claims.iter().filter(|claim| !claim.holds()).collect();
    let is_missing = |name: &&str| records.iter().all(|record| record.name != *name);
    let by_default = BENCHMARKS.iter().filter(|benchmark| benchmark.by_default);
    let names = by_default.flat_map(|benchmark| benchmark.names).copied();
    let missing: Vec<_> = names.filter(is_missing).collect();
    let not_good = match (failed.len(), claims.len()) {
        (0, all) => format!("all {all} claims hold."),
        (failed, all) => format!("{failed} of {all} claims failed:"),
    };
    let mut text: String = [
        "**What**: a balloon takes 7 GiB from an idle guest of 8 GiB (inflates), and gives them back (deflates)."
            .to_owned(),
        "**Against what**: the kernel's C driver on the same device. The configurations take turns.".to_owned(),
        format!("**How much**: {}", ratios.join(" ")),
        format!("**On what**: {cores} cores, with guests of two processors that QEMU {runs}"),
        format!("**Not yet good**: {not_good}"),
    ]
    .iter()
    .map(|line| item("", line))
    .collect();
    text.extend(failed.iter().map(|claim| item("  ", &claim.to_string())));
    if !missing.is_empty() {
        text += &item("  ", &format!("not measured: {}", missing.join(", ")));
    }
    text
}

/// How many times as fast this driver is in the guests of one kernel, if that was measured.
fn how_much(records: &[Record], kernel: &str, [inflate, deflate]: [&str; 2]) -> Option<String> {
    let times = |name, of| tables::times_as_fast(find(records, name, of)?, records);
    let both = |of| {
        Some(format!(
            "{} and {}",
            times(inflate, of)?,
            times(deflate, of)?
        ))
    };
    Some(format!(
        "With {kernel}, this driver inflates and deflates {} times as fast on the device of `vhost-user-balloon \
         --extensions`, and {} times as fast on QEMU's device.",
        both(Contestant::OURS)?,
        both(Contestant::ON_QEMU[0])?
    ))
}

/// An item of a list, in lines.
fn item(indent: &str, text: &str) -> String {
    let mut item = format!("{indent}-");
    let mut column = item.len();
    for word in text.split(' ') {
        if column + 1 + word.len() > COLUMNS {
            item += &format!("\n{indent} ");
            column = indent.len() + 1;
        }
        item += " ";
        item += word;
        column += 1 + word.len();
    }
    item + "\n"
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
fn shown(benchmark: &Benchmark, records: &[Record]) -> Vec<(String, String)> {
    let (name, shows, of) = plots::SCALE;
    let last_of = |plot: &Plot| {
        let with_results = |name: &&str| records.iter().any(|record| record.name == *name);
        plot.names().filter(with_results).last()
    };
    let of_benchmark = records
        .iter()
        .filter(|record| benchmark.names.contains(&&*record.name));
    plots::PLOTS
        .iter()
        .filter(|plot| last_of(plot).is_some_and(|last| benchmark.names.contains(&last)))
        .map(|plot| (plot.name.to_owned(), plot.shows.to_owned()))
        .chain(
            (benchmark.names == [of] && records.iter().any(|record| record.name == of))
                .then_some((name.to_owned(), shows.to_owned())),
        )
        .chain(
            timelines::plots(of_benchmark)
                .into_iter()
                .map(|plot| (plot.name, plot.shows)),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of each configuration of [`GUESTS`] with these times.
    fn records(name: &str, seconds: [f64; 4]) -> Vec<Record> {
        let of = [
            ("c", "qemu"),
            ("rs", "qemu"),
            ("c", "vhost-user"),
            ("rs", "vhost-user"),
        ];
        let records = of.into_iter().zip(seconds).map(|((driver, device), seconds)| {
            serde_json::from_value(serde_json::json!({
                "name": name, "driver": driver, "device": device, "guest_mib": 8192, "amount_mib": 7168,
                "seconds": [seconds],
            }))
            .unwrap()
        });
        records.collect()
    }

    #[test]
    fn the_summary_has_ratios_and_failed_claims() {
        let idle = [
            records("inflate-idle", [3.85, 1.16, 3.48, 0.0314]),
            records("deflate-idle", [3.79, 0.4453, 3.39, 0.0289]),
        ]
        .concat();
        let text = summary(&idle, 2, Accel::Tcg);
        let (five, rest) = text
            .split_once("  - not measured: inflate-debian,")
            .unwrap();
        assert_eq!(
            five,
            "\
- **What**: a balloon takes 7 GiB from an idle guest of 8 GiB (inflates), and gives them back (deflates).
- **Against what**: the kernel's C driver on the same device. The configurations take turns.
- **How much**: With a kernel that does not zero what it allocates, this driver inflates and deflates 111 and 117 times
  as fast on the device of `vhost-user-balloon --extensions`, and 3.32 and 8.51 times as fast on QEMU's device.
- **On what**: 2 cores, with guests of two processors that QEMU emulates (TCG): quote the ratios, not the times.
- **Not yet good**: 2 of 5 claims failed:
  - inflate-idle: time of this driver, vhost-user / time of C driver, vhost-user: 0.0090 (FAILED, the limit is 0.005)
  - inflate-idle: time of this driver, QEMU / time of C driver, QEMU: 0.3013 (FAILED, the limit is 0.22)
"
        );
        assert!(rest.lines().all(|line| line.len() <= COLUMNS));

        let debian = [
            records("inflate-debian", [12.0, 1.5, 12.0, 0.2]),
            records("deflate-debian", [4.0, 2.0, 4.0, 0.04]),
        ];
        let text = summary(&[idle, debian.concat()].concat(), 2, Accel::Tcg).replace("\n  ", " ");
        assert!(text.contains(
            "own kernel, which does, this driver inflates and deflates 60 and 100 times as fast on the"
        ));
        assert!(text.contains("and 8.00 and 2.00 times as fast on QEMU's device.\n"));
    }
}
