// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the machine, which changes results by factors.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm::{Samples, Size};

use crate::record::Record;

/// The memory that is written.
const AMOUNT: Size = Size::mib(256);

/// How much slower than at its best the machine may be.
const LIMIT: f64 = 1.5;

/// Writes memory that the host has to allocate, as guests do. Returns how long it took.
pub(crate) fn write_memory() -> Result<Duration> {
    let mut file = File::from(memfd_create("machine", MFdFlags::MFD_CLOEXEC)?);
    let chunk = vec![1; 1 << 20];
    let start = Instant::now();
    for _ in 0..AMOUNT.as_mib() {
        file.write_all(&chunk)?;
    }
    Ok(start.elapsed())
}

/// A complaint about the machine, if its state has changed during a benchmark with these records.
pub fn complaint(records: &[Record]) -> Option<String> {
    let times = || {
        let times = records
            .iter()
            .filter_map(|record| record.machine_ms.as_ref());
        times.flat_map(Samples::values).copied()
    };
    let (least, most) = (times().reduce(f64::min)?, times().reduce(f64::max)?);
    (most > least * LIMIT).then(|| {
        format!(
            "the machine was not steady: it wrote {AMOUNT} in {least:.0} to {most:.0} ms before the runs"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_slows_down_is_reported() {
        let records = |times: &[[f64; 2]]| -> Vec<Record> {
            let record = |times| {
                serde_json::from_value(serde_json::json!({
                    "name": "inflate-idle", "driver": "c", "device": "qemu", "guest_mib": 8192,
                    "amount_mib": 7168, "seconds": [1.0, 2.0], "machine_ms": times,
                }))
            };
            times.iter().map(|times| record(times).unwrap()).collect()
        };
        assert_eq!(complaint(&records(&[])), None);
        assert_eq!(complaint(&records(&[[50.0, 60.0], [75.0, 70.0]])), None);
        let slow = complaint(&records(&[[50.0, 60.0], [76.0, 70.0]])).unwrap();
        assert!(slow.contains("256 MiB in 50 to 76 ms"), "{slow}");
    }
}
