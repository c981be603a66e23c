// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps in words of 64 bits.

use std::ops::Range;

/// How many bits a word of a bitmap has.
pub(crate) const WORD: u64 = u64::BITS as u64;

/// Sets or clears bits of a bitmap, a word at a time. Calls `each` for each run of bits that change; a run
/// ends with its word. Returns the number of changed bits.
pub(crate) fn set(
    words: &mut [u64],
    bits: Range<u64>,
    ones: bool,
    mut each: impl FnMut(Range<u64>),
) -> u64 {
    let mut changed = 0;
    let mut start = bits.start;
    while start < bits.end {
        let base = start / WORD * WORD;
        let end = bits.end.min(base + WORD);
        let Some(word) = words.get_mut(index(base / WORD)) else {
            break;
        };
        let mask = (u64::MAX << (start - base)) & (u64::MAX >> (base + WORD - end));
        let mut change = mask & if ones { !*word } else { *word };
        *word ^= change;
        changed += u64::from(change.count_ones());
        while change != 0 {
            let first = change.trailing_zeros();
            let last = first + (change >> first).trailing_ones();
            each(base + u64::from(first)..base + u64::from(last));
            change &= u64::MAX.checked_shl(last).unwrap_or(0);
        }
        start = end;
    }
    changed
}

/// The first bit of a bitmap at or after `from` that is one, or zero.
pub(crate) fn find(words: &[u64], from: u64, one: bool) -> Option<u64> {
    let start = from / WORD;
    let mut mask = u64::MAX << (from % WORD);
    for (number, &word) in (start..).zip(words.get(index(start)..)?) {
        let found = mask & if one { word } else { !word };
        if found != 0 {
            return Some(number * WORD + u64::from(found.trailing_zeros()));
        }
        mask = u64::MAX;
    }
    None
}

/// Memory that does not fit into a `usize` cannot have been mapped.
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
