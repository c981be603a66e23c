// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Holds memory with known contents, and detects writes by anyone else.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::child::{MIB, Stop, report};

/// How many words are verified and written again before the next ones: a few pages.
const CHUNK: usize = 8192;

/// The longest pause after a pass. A worker rests as long as its pass took, and leaves the CPU to what is tested.
const MAX_PAUSE: Duration = Duration::from_millis(250);

pub(super) fn run(mib: usize, threads: usize, stop: Stop) -> Result<()> {
    let mut memory = vec![0_u64; mib * MIB / size_of::<u64>()];
    let share = memory.len().div_ceil(threads);
    let passes = AtomicU64::new(0);
    thread::scope(|scope| {
        let workers: Vec<_> = memory
            .chunks_mut(share)
            .enumerate()
            .map(|(number, words)| {
                let passes = &passes;
                scope.spawn(move || {
                    let result = verify(words, (number * share) as u64, passes, stop);
                    // One mismatch ends the load.
                    stop.ask();
                    result
                })
            })
            .collect();
        while !stop.is_asked() {
            // Each worker counts its own passes, and all are about equally fast.
            report(mib, passes.load(Ordering::Relaxed) / threads as u64)?;
            thread::sleep(Duration::from_millis(50));
        }
        for worker in workers {
            worker.join().expect("a worker does not panic")?;
        }
        report(mib, passes.load(Ordering::Relaxed) / threads as u64)
    })
}

/// Verifies one pass and writes the next one, repeatedly, and verifies once more at the end.
fn verify(words: &mut [u64], first: u64, passes: &AtomicU64, stop: Stop) -> Result<()> {
    let mut pass = 0;
    fill(words, first, pass);
    while !stop.is_asked() {
        let start = Instant::now();
        for (number, chunk) in words.chunks_mut(CHUNK).enumerate() {
            let first = first + (number * CHUNK) as u64;
            check(chunk, first, pass)?;
            fill(chunk, first, pass + 1);
        }
        pass += 1;
        passes.fetch_add(1, Ordering::Relaxed);
        thread::sleep(start.elapsed().min(MAX_PAUSE));
    }
    check(words, first, pass)
}

pub(super) fn fill(words: &mut [u64], first: u64, pass: u64) {
    for (word, index) in words.iter_mut().zip(first..) {
        *word = pattern(index, pass);
    }
}

pub(super) fn check(words: &[u64], first: u64, pass: u64) -> Result<()> {
    for (word, index) in words.iter().zip(first..) {
        if *word != pattern(index, pass) {
            bail!(
                "word {index} at {word:p} is {word:#x} in pass {pass}, where {:#x} was written",
                pattern(index, pass)
            );
        }
    }
    Ok(())
}

/// A word that is unique to its place and its pass.
fn pattern(index: u64, pass: u64) -> u64 {
    (index ^ (pass << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
