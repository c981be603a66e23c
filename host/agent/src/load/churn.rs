// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Allocates memory of all kinds, writes to it, verifies it and frees it, without pause. So the load detects a
//! driver that lists a page in use as unused.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::child::{MIB, Stop, report};
use super::hold::{check, fill};

/// The largest allocation, in words.
const LARGEST: usize = 16 * MIB / size_of::<u64>();

/// How many words of a file are read or written at once.
const CHUNK: usize = 8192;

/// How many pieces a worker keeps at most.
const PIECES: usize = 256;

pub(super) fn run(mib: usize, threads: usize, seed: u64, stop: Stop) -> Result<()> {
    let verified = AtomicU64::new(0);
    let share = mib * MIB / size_of::<u64>() / threads;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads as u64)
            .map(|worker| {
                let verified = &verified;
                scope.spawn(move || {
                    let random = Rng::with_seed(seed ^ (worker << 32));
                    let result = churn(random, share, verified, stop);
                    // One mismatch ends the load.
                    stop.ask();
                    result
                })
            })
            .collect();
        while !stop.is_asked() {
            report(mib, verified.load(Ordering::Relaxed))?;
            thread::sleep(Duration::from_millis(50));
        }
        for worker in workers {
            worker.join().expect("a worker does not panic")?;
        }
        report(mib, verified.load(Ordering::Relaxed))
    })
}

/// Keeps up to `share` words in pieces, and verifies and replaces one piece after the other.
fn churn(mut random: Rng, share: usize, verified: &AtomicU64, stop: Stop) -> Result<()> {
    let mut pieces = VecDeque::new();
    let mut words = 0;
    while !stop.is_asked() {
        // Small pieces, which fragment memory, and large ones.
        let len = (LARGEST >> random.u32(0..14)).min(share / 2).max(1);
        while words + len > share || pieces.len() >= PIECES {
            let piece: Piece = pieces
                .remove(random.usize(0..pieces.len()))
                .context("a piece")?;
            piece.verify()?;
            words -= piece.len;
            verified.fetch_add(1, Ordering::Relaxed);
        }
        pieces.push_back(Piece::new(&mut random, len)?);
        words += len;
    }
    pieces.iter().try_for_each(Piece::verify)
}

/// Memory with known contents.
struct Piece {
    memory: Memory,
    len: usize,
    /// Different for each piece, so that contents differ.
    pass: u64,
}

enum Memory {
    Anonymous(Vec<u64>),
    /// In a file of a tmpfs, which is shared memory, or in the page cache alone.
    File(File),
}

impl Piece {
    fn new(random: &mut Rng, len: usize) -> Result<Self> {
        let pass = random.u64(..);
        let memory = match random.u8(0..4) {
            0 | 1 => {
                let mut words = vec![0; len];
                fill(&mut words, 0, pass);
                Memory::Anonymous(words)
            }
            2 => Memory::File(memfd_create("churn", MFdFlags::MFD_CLOEXEC)?.into()),
            _ => Memory::File(unnamed(pass)?),
        };
        if let Memory::File(file) = &memory {
            for_each_chunk(len, |first, words| {
                fill(words, first as u64, pass);
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                Ok(file.write_all_at(&bytes, (first * size_of::<u64>()) as u64)?)
            })?;
        }
        Ok(Self { memory, len, pass })
    }

    fn verify(&self) -> Result<()> {
        match &self.memory {
            Memory::Anonymous(words) => check(words, 0, self.pass),
            Memory::File(file) => for_each_chunk(self.len, |first, words| {
                let mut bytes = vec![0; size_of_val(words)];
                file.read_exact_at(&mut bytes, (first * size_of::<u64>()) as u64)?;
                for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(size_of::<u64>())) {
                    *word = u64::from_ne_bytes(bytes.try_into()?);
                }
                check(words, first as u64, self.pass).context("in a file")
            }),
        }
    }
}

/// An unlinked file of the root file system.
fn unnamed(number: u64) -> Result<File> {
    let path = format!("/churn-{number:x}");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// Calls `act` with space for all words from 0 to `len`, some at a time, and the index of the first of them.
fn for_each_chunk(len: usize, mut act: impl FnMut(usize, &mut [u64]) -> Result<()>) -> Result<()> {
    let mut words = vec![0; CHUNK.min(len)];
    for first in (0..len).step_by(CHUNK) {
        let Some(words) = words.get_mut(..CHUNK.min(len - first)) else {
            bail!("a chunk is longer than the first one");
        };
        act(first, words)?;
    }
    Ok(())
}
