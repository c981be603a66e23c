// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's flags of each page.

use std::fs::File;
use std::os::unix::fs::FileExt;

use agent::PageFlag;
use anyhow::{Context, Result};

/// A word with flags for each page.
const FLAGS: &str = "/proc/kpageflags";
const WORD: usize = size_of::<u64>();

/// How many pages one call reads.
const CHUNK: u64 = 1 << 13;

/// How many of the pages from `start` to `end` have all of `flags`.
pub(crate) fn count(start: u64, end: u64, flags: &[PageFlag]) -> Result<u64> {
    let flags = flags.iter().fold(0, |all, &flag| all | (1 << flag as u32));
    let file = File::open(FLAGS).with_context(|| format!("opening {FLAGS}"))?;
    let mut number = 0;
    let mut page = start;
    while page < end {
        let mut words = vec![0; usize::try_from(CHUNK.min(end - page))? * WORD];
        let length = file.read_at(&mut words, page * WORD as u64)?;
        // Memory ends here.
        if length < WORD {
            break;
        }
        let words = words[..length].chunks_exact(WORD);
        page += words.len() as u64;
        for word in words {
            number += u64::from(u64::from_ne_bytes(word.try_into()?) & flags == flags);
        }
    }
    Ok(number)
}
