// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copies memory, as fast as possible.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use anyhow::Result;

use super::child::{MIB, Stop, in_threads};

pub(super) fn run(mib: usize, threads: usize, stop: Stop) -> Result<()> {
    in_threads(mib, threads, stop, |passes| {
        let half = mib * MIB / threads / 2;
        let (from, mut to) = (vec![1_u8; half], vec![0_u8; half]);
        while !stop.is_asked() {
            // A pass is a MiB, so that there are many of them.
            for (from, to) in from.chunks(MIB).zip(to.chunks_mut(MIB)) {
                to.copy_from_slice(from);
                black_box(&to);
                passes.fetch_add(1, Ordering::Relaxed);
            }
        }
    })
}
