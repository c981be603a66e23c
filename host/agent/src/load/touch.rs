// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Touches memory and frees it, so that the host has something to take back.

use std::hint::black_box;
use std::thread;

use anyhow::Result;

use super::child::{MIB, report, touch_pages};

pub(super) fn run(mib: usize) -> Result<()> {
    let mut memory = vec![0; mib * MIB];
    let threads = thread::available_parallelism()?.get();
    let share = memory.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        for part in memory.chunks_mut(share) {
            scope.spawn(move || touch_pages(part));
        }
    });
    black_box(&memory);
    report(mib, 1)
}
