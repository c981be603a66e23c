// SPDX-License-Identifier: GPL-2.0

//! The extended protocol's messages: page sets.
//!
//! A message fits into one page, since an order-0 page is always available. As a bitmap it covers
//! 127 MiB of pages of 4 KiB, and its header is less than a hundredth of it.
//!
//! Format: docs/protocol.md, section 4.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{
        Encoder,
        Encoding,
        Encodings,
        Subject, //
    },
    messages::ranges::Ranges,
    rust::{
        virtio::{
            self,
            FeatureBit, //
        },
        virtio_balloon::PageSet, //
    }, //
};

use kernel::{
    device::Core,
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

/// The maximum number of words in a message, header included.
pub(crate) const WORDS_PER_MESSAGE: usize = PAGE_SIZE / WORD;

/// How many messages share one notification: few enough to keep both sides busy, and enough to
/// spread the cost of the notification, a VM exit.
pub(crate) const MESSAGES_PER_NOTIFICATION: usize = 16;

/// How many ranges a message has room for at least, however long they are.
pub(crate) const RANGES_PER_MESSAGE: usize = (WORDS_PER_MESSAGE - HEADER_WORDS) / 2;

/// Returns the feature without which a device does not accept `encoding`. Every device that accepts
/// page sets accepts those of the first version of the protocol.
fn feature(encoding: Encoding) -> Option<FeatureBit> {
    match encoding {
        Encoding::Ranges | Encoding::Bitmap => None,
    }
}

/// Returns the encodings that `dev` accepts.
pub(crate) fn encodings(dev: &virtio::Device<Core<'_>>) -> Encodings {
    Encodings::ALL
        .filter(|encoding| feature(encoding).is_none_or(|feature| dev.has_feature(feature)))
}

/// Writes as many of `ranges` to `message` as there is room for, without growing it. The message
/// has the command `command`. If `request_id` is not 0, it is a part of the answer to that request,
/// and others follow. It has one of the encodings `allowed`. Returns the number of pages.
///
/// # Errors
///
/// `ENOSPC` if there is no room for any range, or if there is none.
pub(crate) fn write(
    message: &mut KVec<u64>,
    command: u16,
    request_id: u64,
    allowed: Encodings,
    ranges: &mut impl Ranges,
) -> Result<u64> {
    let len = message.capacity();
    message.resize(len, 0, GFP_NOWAIT)?;

    let (head, payload) = message.split_at_mut_checked(HEADER_WORDS).ok_or(ENOSPC)?;
    // A bitmap may end long before the pages do.
    let allowed = match ranges.are_one_message() {
        true => allowed.with(Encoding::Ranges),
        false => allowed,
    };
    let mut encoder = Encoder::new(payload, allowed).ok_or(ENOSPC)?;

    while let Some(range) = ranges.first() {
        let rest = encoder.push(range);

        ranges.advance(range.len() - rest.map_or(0, |rest| rest.len()));
        if rest.is_some() {
            break;
        }
    }

    let subject = Subject {
        command,
        page_shift: PAGE_SHIFT as u8,
        request_id,
        more: request_id != 0 || ranges.first().is_some(),
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
