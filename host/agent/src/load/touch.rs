// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Touches memory and frees it, so that the host has something to take back.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};

use anyhow::Result;

use super::child::{MIB, report, touch_pages};

/// How much memory a thread touches between two reports.
const STEP: usize = 256 * MIB;

pub(super) fn run(mib: usize) -> Result<()> {
    let mut memory = vec![0; mib * MIB];
    let threads = thread::available_parallelism()?.get();
    let share = memory.len().div_ceil(threads).max(1);
    let touched = AtomicUsize::new(0);
    let touch = |part: &mut [u8]| {
        part.chunks_mut(STEP).try_for_each(|step| {
            touch_pages(step);
            let before = touched.fetch_add(step.len(), Ordering::Relaxed);
            report((before + step.len()) / MIB, 0)
        })
    };
    thread::scope(|scope| {
        let parts = memory.chunks_mut(share);
        let running: Vec<_> = parts.map(|part| scope.spawn(|| touch(part))).collect();
        let mut ended = running.into_iter().map(ScopedJoinHandle::join);
        ended.try_for_each(|result| result.expect("a thread does not panic"))
    })?;
    black_box(&memory);
    report(mib, 1)
}
