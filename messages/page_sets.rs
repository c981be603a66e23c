// SPDX-License-Identifier: GPL-2.0

//! The extended protocol's messages: page sets.
//!
//! A message fits into one page, so that there is always memory for one: as a bitmap it covers 127
//! MiB of pages of 4 KiB, and its header is less than a hundredth of that.
//!
//! Format: docs/protocol.md, section 4.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{
        Encoder,
        Encoding,
        Subject, //
    },
    messages::runs::Runs,
    rust::virtio_balloon::PageSet, //
};

use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    transmute::AsBytes, //
};

/// The size of a word in bytes.
pub(crate) const WORD: usize = size_of::<u64>();

/// The length of a message's header in words.
const HEADER_WORDS: usize = size_of::<PageSet>() / WORD;

/// How many words a message has at most, header included.
pub(crate) const WORDS_PER_MESSAGE: usize = PAGE_SIZE / WORD;

/// How many runs a message names at least, however long they are.
pub(crate) const RUNS_PER_MESSAGE: usize = (WORDS_PER_MESSAGE - HEADER_WORDS) / 2;

/// Names as many of `runs` in `message`, which never grows beyond its capacity, as there is room
/// for. The message is about `command`, and a part of the answer to `request_id` if that is not 0:
/// its completion is yet to come. Returns how many pages it names.
///
/// # Errors
///
/// `ENOSPC` if there is no room for any run, or if there is none.
pub(crate) fn write(
    message: &mut KVec<u64>,
    command: u16,
    request_id: u64,
    forced: Option<Encoding>,
    runs: &mut impl Runs,
) -> Result<u64> {
    let len = message.capacity();
    message.resize(len, 0, GFP_NOWAIT)?;

    let (head, payload) = message.split_at_mut_checked(HEADER_WORDS).ok_or(ENOSPC)?;
    // A forced bitmap may end long before the pages do.
    let forced = forced.filter(|_| !runs.are_one_message());
    let mut encoder = Encoder::new(payload, forced).ok_or(ENOSPC)?;

    while let Some(run) = runs.first() {
        let rest = encoder.push(run);

        runs.advance(run.len() - rest.map_or(0, |rest| rest.len()));
        if rest.is_some() {
            break;
        }
    }

    let subject = Subject {
        command,
        page_shift: PAGE_SHIFT as u8,
        request_id,
        more: request_id != 0 || runs.first().is_some(),
    };
    let (header, words) = encoder.finish(subject).ok_or(ENOSPC)?;

    put(head, &header);
    message.truncate(HEADER_WORDS + words);
    Ok(u64::from_le(header.count))
}

/// Writes `header`, which is a number of words long, to the beginning of `words`.
pub(crate) fn put(words: &mut [u64], header: &impl AsBytes) {
    for (word, bytes) in words.iter_mut().zip(header.as_bytes().chunks_exact(WORD)) {
        // Each has the length of a word.
        *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
    }
}
