// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Results as tables, for a terminal and for the documentation.

use std::collections::BTreeSet;

use benchmarks::{Benchmark, Division, Record, Stages, complaint};
use comfy_table::presets::{ASCII_MARKDOWN, UTF8_FULL_CONDENSED};
use comfy_table::{CellAlignment, Table};
use vm::{Samples, Size};

use super::results::of;

/// A column: its head, and the value of a record in it, if there is one.
type Column<'a> = (&'a str, Box<dyn Fn(&Record) -> Option<String> + 'a>);

/// The number of runs from which on the table has their 99th percentile.
const MANY_RUNS: usize = 100;

/// The number of runs from which on the table has the 99th percentile of stalls.
const SOME_RUNS: usize = 20;

/// The number of columns that identify a record.
const SUBJECT_COLUMNS: usize = 4;

/// Prints the results of a benchmark, and its claims.
pub(super) fn print(benchmark: &Benchmark, records: &[Record]) {
    println!("\n{}", benchmark.answers);
    for (name, of_name) in of(benchmark, records) {
        println!("\n{name}: {}", amount(&of_name));
        for table in tables(&of_name, records) {
            println!("{}", finish(table, UTF8_FULL_CONDENSED));
        }
    }
    for claim in benchmark.check(records) {
        println!("{claim}");
    }
    if let Some(complaint) = complaint(records) {
        println!("{complaint}");
    }
    println!();
}

/// The tables of the records with one name, in Markdown.
pub(super) fn markdown(of_name: &[&Record], records: &[Record]) -> String {
    let tables = tables(of_name, records).into_iter();
    let tables: Vec<_> = tables
        .map(|table| unbroken(&finish(table, ASCII_MARKDOWN).to_string()))
        .collect();
    tables.join("\n\n")
}

/// A table in Markdown of which a narrow page breaks the head, and no cells below it.
fn unbroken(table: &str) -> String {
    let cell = |cell: &str| {
        let text = cell.trim();
        cell.replace(text, &text.replace(' ', "\u{a0}"))
    };
    let line = |(number, line): (usize, &str)| match number {
        0 | 1 => line.to_owned(),
        _ => line.split('|').map(cell).collect::<Vec<_>>().join("|"),
    };
    let lines: Vec<_> = table.lines().enumerate().map(line).collect();
    lines.join("\n")
}

/// The commits of the records, after a comma.
pub(super) fn commits(records: &[&Record]) -> String {
    let commits: BTreeSet<&str> = records
        .iter()
        .filter_map(|record| record.commit.as_deref())
        .collect();
    commits
        .into_iter()
        .flat_map(|commit| [", commit ", commit])
        .collect()
}

/// The amount of memory.
pub(super) fn amount(records: &[&Record]) -> String {
    let size = |mib: u64| match mib {
        0 => "nothing".to_owned(),
        mib => Size::mib(mib).to_string(),
    };
    let of = |record: &Record| format!("{} of {}", size(record.amount_mib), size(record.guest_mib));
    let least = records.iter().min_by_key(|record| record.guest_mib);
    let most = records.iter().max_by_key(|record| record.guest_mib);
    match (least, most) {
        (Some(least), Some(most)) if least.guest_mib < most.guest_mib => {
            format!("{} to {}", of(least), of(most))
        }
        (least, _) => least.map_or(String::new(), |record| of(record)),
    }
}

fn finish(mut table: Table, preset: &str) -> Table {
    table.load_preset(preset);
    table
}

/// The table of the times and other measurements, and that of the stages, if there are any.
fn tables(of_name: &[&Record], all: &[Record]) -> Vec<Table> {
    let (staged, plain): (Vec<&Record>, Vec<&Record>) =
        of_name.iter().partition(|record| record.stages.is_some());
    let mut columns = main_columns(all);
    columns.extend(division_columns(all));
    let mut tables = vec![table(&plain, columns)];
    if !staged.is_empty() {
        tables.push(table(&staged, stage_columns()));
    }
    tables
}

fn main_columns(all: &[Record]) -> Vec<Column<'_>> {
    time_columns(all)
        .into_iter()
        .chain(cost_columns())
        .collect()
}

fn time_columns(all: &[Record]) -> Vec<Column<'_>> {
    vec![
        (
            "runs",
            Box::new(|r| Some(r.seconds.values().len().to_string())),
        ),
        ("time", Box::new(|r| Some(r.seconds.in_seconds()))),
        (
            "99 % within",
            Box::new(|r| {
                let is_one_of_many = r.seconds.values().len() >= MANY_RUNS;
                is_one_of_many.then(|| short_time(r.seconds.percentile(99)))
            }),
        ),
        (
            "speed-up",
            Box::new(|r| Some(speed_up(&r.seconds, &r.base(all)?.seconds))),
        ),
    ]
}

fn cost_columns() -> Vec<Column<'static>> {
    vec![
        ("bytes sent", Box::new(|r| r.wire_bytes.map(grouped))),
        ("notifications", Box::new(|r| r.notifications.map(grouped))),
        ("interrupts", Box::new(|r| r.interrupts.map(grouped))),
        (
            "bits per page",
            Box::new(|r| r.bits_per_page.map(|bits| format!("{bits:.3}"))),
        ),
        (
            "copied",
            Box::new(|r| r.transferred_mib.map(|mib| format!("{} MiB", grouped(mib)))),
        ),
        (
            "peak above the beginning",
            Box::new(|r| r.peak_mib.map(|mib| format!("{} MiB", grouped(mib)))),
        ),
        (
            "load's throughput",
            Box::new(|r| Some(r.throughput.as_ref()?.in_unit(100.0, 0, "%"))),
        ),
        (
            "longest stall",
            Box::new(|r| Some(r.stall_ms.as_ref()?.in_unit(1.0, 1, "ms"))),
        ),
        (
            "99 % of stalls within",
            Box::new(|r| {
                let stalls = r.stall_ms.as_ref()?;
                let is_one_of_some = stalls.values().len() >= SOME_RUNS;
                is_one_of_some.then(|| format!("{:.1} ms", stalls.percentile(99)))
            }),
        ),
        ("host CPU", Box::new(|r| r.host_cpu_s.map(seconds))),
        ("guest CPU", Box::new(|r| r.guest_cpu_s.map(seconds))),
        ("device CPU", Box::new(|r| r.device_cpu_s.map(short_time))),
        (
            "daemon memory",
            Box::new(|r| r.daemon_kib.map(|kib| Size::kib(kib).to_string())),
        ),
        (
            "256 MiB written",
            Box::new(|r| Some(r.machine_ms.as_ref()?.in_unit(1.0, 0, "ms"))),
        ),
    ]
}

/// How a host's memory was divided.
fn division_columns(all: &[Record]) -> Vec<Column<'_>> {
    let of = |name, text: fn(&Division) -> String| -> Column<'_> {
        (name, Box::new(move |r| r.division.as_ref().map(text)))
    };
    vec![
        (
            "waits, 99 %",
            Box::new(|r| {
                r.division.as_ref()?;
                Some(seconds(r.waits(all)?.percentile(99)))
            }),
        ),
        of("stalled", |division| percent(division.stalled)),
        of("killed", |division| division.kills.to_string()),
        of("most / pool", |division| {
            percent(division.most / division.pool)
        }),
        of("time above the pool", |division| percent(division.above)),
        of("mean / needed", |division| {
            percent(division.mean / division.needed)
        }),
        of("changes", |division| format!("{:.1}", division.changes)),
    ]
}

fn stage_columns() -> Vec<Column<'static>> {
    let stage = |name, of: fn(Stages) -> f64| -> Column<'static> {
        let text = move |record: &Record| {
            let time = of(record.stages?);
            let part = time / record.seconds.median() * 100.0;
            Some(format!("{}, {part:.1} %", short_time(time)))
        };
        (name, Box::new(text))
    };
    vec![
        ("time", Box::new(|r| Some(r.seconds.in_seconds()))),
        stage("allocate", |stages| stages.allocate),
        stage("send", |stages| stages.send),
        stage("translate", |stages| stages.translate),
        stage("return", |stages| stages.give_back),
    ]
}

/// The columns in which at least one of the records has a value.
fn table(records: &[&Record], columns: Vec<Column<'_>>) -> Table {
    let several_guests = records
        .windows(2)
        .any(|pair| pair[0].guest_mib != pair[1].guest_mib);
    let several_settings = records
        .windows(2)
        .any(|pair| pair[0].zeroing != pair[1].zeroing);
    let subject: [Column<'_>; SUBJECT_COLUMNS] = [
        ("", Box::new(|r| Some(r.contestant().to_string()))),
        ("variant", Box::new(|r| r.detail.clone())),
        (
            "guest",
            Box::new(move |r| several_guests.then(|| Size::mib(r.guest_mib).to_string())),
        ),
        (
            "kernel",
            Box::new(move |r| {
                several_settings
                    .then(|| r.zeroing.parameter())?
                    .map(str::to_owned)
            }),
        ),
    ];
    let columns: Vec<_> = subject
        .into_iter()
        .chain(columns)
        .filter(|(_, text)| records.iter().any(|record| text(record).is_some()))
        .collect();
    let mut table = Table::new();
    table.set_header(columns.iter().map(|(head, _)| *head));
    for record in records {
        let cells = columns
            .iter()
            .map(|(_, text)| text(record).unwrap_or_default());
        table.add_row(cells);
    }
    for (column, (head, _)) in table.column_iter_mut().zip(&columns) {
        if !["", "variant", "guest", "kernel"].contains(head) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The speed-up of these relative to others, from the medians, and its lower and upper bound.
fn speed_up(times: &Samples, others: &Samples) -> String {
    let ratios = [
        others.median() / times.median(),
        others.min() / times.max(),
        others.max() / times.min(),
    ];
    let digits = digits(ratios[0]);
    let [median, least, most] = ratios.map(|ratio| format!("{ratio:.digits$}"));
    match times.overlaps(others) {
        true => format!("{median} times, within the noise"),
        false => format!("{median} times ({least} to {most})"),
    }
}

/// The digits that a ratio has after its point.
fn digits(ratio: f64) -> usize {
    if ratio < 10.0 { 2 } else { 0 }
}

/// How many times as fast a record is as its baseline.
pub(super) fn times_as_fast(record: &Record, all: &[Record]) -> Option<String> {
    let ratio = record.base(all)?.seconds.ratio(&record.seconds);
    let digits = digits(ratio);
    Some(format!("{ratio:.digits$}"))
}

/// A time, in a suitable unit.
pub(super) fn short_time(seconds: f64) -> String {
    match seconds < 0.5 {
        true => format!("{:.1} ms", seconds * 1e3),
        false => format!("{seconds:.2} s"),
    }
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.2} s")
}

fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

/// A number with thousands separators.
fn grouped(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_name_their_commits_once() {
        let record = |commit: Option<&str>| -> Record {
            serde_json::from_value(serde_json::json!({
                "name": "inflate-idle", "driver": "rs", "device": "qemu", "commit": commit,
                "guest_mib": 8192, "amount_mib": 7168, "seconds": [1.0],
            }))
            .unwrap()
        };
        let records = [
            record(Some("b0b0b0b0b0b0+")),
            record(None),
            record(Some("a1a1a1a1a1a1")),
            record(Some("a1a1a1a1a1a1")),
        ];
        let all: Vec<_> = records.iter().collect();
        assert_eq!(commits(&all), ", commit a1a1a1a1a1a1, commit b0b0b0b0b0b0+");
        assert_eq!(commits(&all[1..2]), "");
    }

    #[test]
    fn cells_stay_on_one_line_each() {
        assert_eq!(
            unbroken(
                "|      | bytes sent |\n|------|------------|\n| 2 s  |            |\n|  1 s |       no 1 |"
            ),
            "|      | bytes sent |\n|------|------------|\n| 2\u{a0}s  |            |\n|  1\u{a0}s |       no\u{a0}1 |"
        );
    }

    #[test]
    fn what_overlaps_is_within_the_noise() {
        let samples = |values: [f64; 3]| Samples::from_iter(values);
        let (slow, fast) = (samples([3.0, 4.0, 5.0]), samples([0.02, 0.04, 0.05]));
        assert_eq!(speed_up(&fast, &slow), "100 times (60 to 250)");
        assert_eq!(
            speed_up(&samples([3.5, 3.8, 6.0]), &slow),
            "1.05 times, within the noise"
        );
    }
}
