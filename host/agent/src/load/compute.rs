// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps processors busy, and uses hardly any memory.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use anyhow::Result;

use super::child::{Stop, in_threads};

/// How many steps there are in a pass: a few milliseconds of an emulated processor's time.
const STEPS: u64 = 1 << 20;

pub(super) fn run(threads: usize, stop: Stop) -> Result<()> {
    in_threads(0, threads, stop, |passes| {
        let mut state = 1_u64;
        while !stop.is_asked() {
            for _ in 0..STEPS {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
            }
            black_box(state);
            passes.fetch_add(1, Ordering::Relaxed);
        }
    })
}
