// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Uses the first disk as programs use their own files: maps it and reads from each page
//! repeatedly.

use std::fs::File;
use std::hint::black_box;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use memmap2::MmapOptions;

use super::child::{MIB, PAGE_SIZE, Stop, in_threads};

const DISK: &str = "/dev/vda";

pub(super) fn run(mib: usize, stop: Stop) -> Result<()> {
    let file = File::open(DISK).with_context(|| format!("opening {DISK}"))?;
    // SAFETY: Nothing writes to the disk meanwhile.
    let map = unsafe { MmapOptions::new().len(mib * MIB).map(&file) }
        .with_context(|| format!("mapping {DISK}"))?;
    in_threads(mib, 1, stop, |passes| {
        while !stop.is_asked() {
            for page in map.chunks(PAGE_SIZE) {
                black_box(page[0]);
            }
            passes.fetch_add(1, Ordering::Relaxed);
        }
    })
}
