// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of the README.

use anyhow::{Context, Result};
use benchmarks::{Contestant, Record, find};

use super::tables;

/// The guests of the table and of the summary: their kernel, and the names of their records for inflating and
/// deflating.
pub(super) const GUESTS: [(&str, [&str; 2]); 2] = [
    (
        "a kernel that does not zero what it allocates",
        ["inflate-idle", "deflate-idle"],
    ),
    (
        "Debian's own kernel, which does",
        ["inflate-debian", "deflate-debian"],
    ),
];

/// The configurations.
const CONFIGURATIONS: [Contestant; 5] = [
    Contestant::STOCK,
    Contestant::ON_QEMU[0],
    Contestant::BALLOONS[1],
    Contestant::OURS,
    Contestant::VIRTIO_MEM,
];

/// The head of the table.
const HEAD: &str = "\
| 7 GiB of an idle 8 GiB guest | inflate | deflate | host CPU | guest CPU | peak |
|---|--:|--:|--:|--:|--:|
";

/// The comments around it.
const AROUND: [&str; 2] = [
    "<!-- make bench-docs writes this table -->\n",
    "<!-- end of the table -->\n",
];

/// The README with the table of these records. It stays as it is without all of them.
///
/// # Errors
///
/// It has no place for the table.
pub(super) fn with_table(readme: &str, records: &[Record]) -> Result<String> {
    let [begin, end] = AROUND;
    let (before, rest) = readme
        .split_once(begin)
        .context("the README has no table")?;
    let (old, after) = rest
        .split_once(end)
        .context("the README's table has no end")?;
    let table = table(records).unwrap_or_else(|| old.to_owned());
    Ok([before, begin, &table, end, after].concat())
}

/// The table, if there are all records.
fn table(records: &[Record]) -> Option<String> {
    let of_guests = |(kernel, names)| {
        let rows: Option<String> = CONFIGURATIONS
            .into_iter()
            .map(|of| row(records, names, of))
            .collect();
        Some(format!("| **With {kernel}:** | | | | | |\n{}", rows?))
    };
    let rows: Option<String> = GUESTS.into_iter().map(of_guests).collect();
    Some(HEAD.to_owned() + &rows?)
}

/// The row of a configuration: its times for inflating and for deflating, the processors' time for both, and the larger
/// one of the peaks.
fn row(records: &[Record], [inflate, deflate]: [&str; 2], of: Contestant) -> Option<String> {
    let both = [find(records, inflate, of)?, find(records, deflate, of)?];
    let [inflate, deflate] = both.map(|record| time(record, records));
    let sum = |cpu: fn(&Record) -> Option<f64>| Some(cpu(both[0])? + cpu(both[1])?);
    let cells = [
        inflate,
        deflate,
        format!("{:.2} s", sum(|record| record.host_cpu_s)?),
        format!("{:.2} s", sum(|record| record.guest_cpu_s)?),
        format!("{} MiB", both[0].peak_mib?.max(both[1].peak_mib?)),
    ];
    // A narrow page does not break them.
    let cells = cells.map(|cell| cell.replace(' ', "\u{a0}"));
    Some(format!("| {of} | {} |\n", cells.join(" | ")))
}

/// A time, and how many times as fast that is as the baseline.
fn time(record: &Record, records: &[Record]) -> String {
    let time = tables::short_time(record.seconds.median());
    let ratio = tables::times_as_fast(record, records).map(|ratio| format!(" ({ratio}×)"));
    time + &ratio.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of all configurations in one kind of guest. Deflating takes half as long as inflating.
    fn records(kernel: &str, seconds: [f64; 5]) -> Vec<Record> {
        let of = [
            ("c", "qemu"),
            ("rs", "qemu"),
            ("c", "vhost-user"),
            ("rs", "vhost-user"),
            ("virtio-mem", "qemu"),
        ];
        let record = |name: &str, (driver, device), seconds: f64, peak: u64| {
            serde_json::from_value(serde_json::json!({
                "name": format!("{name}-{kernel}"), "driver": driver, "device": device,
                "guest_mib": 8192, "amount_mib": 7168, "seconds": [seconds], "peak_mib": peak,
                "host_cpu_s": seconds * 1.5, "guest_cpu_s": seconds * 0.5,
            }))
            .unwrap()
        };
        let records = of.into_iter().zip(seconds).flat_map(|(of, seconds)| {
            [
                record("inflate", of, seconds, 3),
                record("deflate", of, seconds / 2.0, 12),
            ]
        });
        records.collect()
    }

    #[test]
    fn it_has_all_configurations_in_both_guests() {
        let readme = include_str!("../../../../README.md");
        let idle = records("idle", [3.84, 1.16, 3.48, 0.0314, 0.4]);
        assert_eq!(with_table(readme, &idle).unwrap(), readme);
        let all = [idle, records("debian", [12.5, 1.4, 13.2, 0.36, 3.0])].concat();
        let new = with_table(readme, &all).unwrap();
        let rows = "\
| **With a kernel that does not zero what it allocates:** | | | | | |
| C driver, QEMU | 3.84 s | 1.92 s | 8.64 s | 2.88 s | 12 MiB |
| this driver, QEMU | 1.16 s (3.31×) | 0.58 s (3.31×) | 2.61 s | 0.87 s | 12 MiB |
| C driver, vhost-user | 3.48 s | 1.74 s | 7.83 s | 2.61 s | 12 MiB |
| this driver, vhost-user | 31.4 ms (111×) | 15.7 ms (111×) | 0.07 s | 0.02 s | 12 MiB |
| virtio-mem | 400.0 ms (9.60×) | 200.0 ms (9.60×) | 0.90 s | 0.30 s | 12 MiB |
| **With Debian's own kernel, which does:** | | | | | |
| C driver, QEMU | 12.50 s | 6.25 s | 28.12 s | 9.38 s | 12 MiB |
";
        assert!(new.replace('\u{a0}', " ").contains(rows), "{new}");
        assert_eq!(with_table(&new, &all).unwrap(), new);
        assert!(new.lines().count() <= 200, "the README is too long");
    }

    #[test]
    fn it_stays_as_it_is_without_a_cost() {
        let readme = AROUND.concat();
        let mut all = [
            records("idle", [3.84, 1.16, 3.48, 0.0314, 0.4]),
            records("debian", [12.5, 1.4, 13.2, 0.36, 3.0]),
        ]
        .concat();
        assert_ne!(with_table(&readme, &all).unwrap(), readme);
        all[0].guest_cpu_s = None;
        assert_eq!(with_table(&readme, &all).unwrap(), readme);
    }
}
