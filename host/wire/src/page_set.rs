// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Page sets: messages that list pages (docs/protocol.md).
//!
//! The decoder checks a whole message before it returns any of its pages, so that no message is
//! executed partly. It reads the message twice for that: the bytes must be a copy, not guest memory,
//! which may change meanwhile. A message has at most [`VIRTIO_BALLOON_PAGE_SET_MAX_BYTES`], and
//! reading it allocates nothing.

use std::mem::offset_of;
use std::ops::Range;
use std::slice::ChunksExact;

use strum::VariantArray;
use thiserror::Error;

use crate::{
    VIRTIO_BALLOON_PAGE_SET_BITMAP, VIRTIO_BALLOON_PAGE_SET_COUNT_BITS,
    VIRTIO_BALLOON_PAGE_SET_DEFLATE, VIRTIO_BALLOON_PAGE_SET_INFLATE,
    VIRTIO_BALLOON_PAGE_SET_MAX_BYTES, VIRTIO_BALLOON_PAGE_SET_MORE,
    VIRTIO_BALLOON_PAGE_SET_RANGES, VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD,
    VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP, virtio_balloon_page_set as Header,
};

/// The size of the header in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The size of the longest message in bytes, header included.
pub const MAX_SIZE: usize = VIRTIO_BALLOON_PAGE_SET_MAX_BYTES as usize;

/// The size of a word of the payload in bytes.
const WORD: usize = size_of::<u64>();

/// An error in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The header, a word of the payload, or a long range is incomplete.
    #[error("it ends too early")]
    Truncated,
    /// It is longer than a message may be.
    #[error("it is longer than {VIRTIO_BALLOON_PAGE_SET_MAX_BYTES} bytes")]
    TooLong,
    /// The command is not one for pages.
    #[error("there is no command {0} for pages")]
    Command(u16),
    /// The pages are smaller than 4 KiB, or too large for any memory.
    #[error("there are no pages of 2^{0} bytes")]
    PageShift(u8),
    /// The encoding has no meaning.
    #[error("there is no encoding {0}")]
    Encoding(u8),
    /// A reserved bit or field is not 0.
    #[error("a reserved bit is set")]
    Reserved,
    /// An answer has the request id 0, or another message has a request id.
    #[error("the request id {0} does not go with the command")]
    RequestId(u64),
    /// It has no page.
    #[error("it names no page")]
    Empty,
    /// A range has no page.
    #[error("a range is empty")]
    EmptyRange,
    /// A page is beyond the end of any memory.
    #[error("a page is beyond 2^64 bytes")]
    Overflow,
    /// A range begins before the end of the previous one.
    #[error("the ranges are not in ascending order, or overlap")]
    Disorder,
    /// The header has another number of pages.
    #[error("it names {named} pages and says that they are {said}")]
    Count {
        /// The number of pages in the header.
        said: u64,
        /// The number of pages in the payload.
        named: u64,
    },
}

/// The purpose of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Inflate.
    Inflate,
    /// Deflate.
    Deflate,
    /// They were unused at some moment after the driver had seen the request.
    UnusedSkip,
    /// They are unused until the device has used the buffer.
    UnusedDiscard,
}

/// How pages are encoded. A device counts page sets for each encoding, and shows the counts by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VariantArray)]
pub enum Encoding {
    /// As page frame numbers and numbers of pages.
    Ranges,
    /// As a bitmap from the first page to the last page.
    Bitmap,
}

impl Encoding {
    /// All of them.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Its number in the header of a message.
    pub const fn number(self) -> u32 {
        match self {
            Self::Ranges => VIRTIO_BALLOON_PAGE_SET_RANGES,
            Self::Bitmap => VIRTIO_BALLOON_PAGE_SET_BITMAP,
        }
    }

    /// Its name in counters and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ranges => "ranges",
            Self::Bitmap => "bitmaps",
        }
    }

    fn from_number(number: u8) -> Result<Self, Error> {
        let mut all = Self::ALL.iter().copied();
        all.find(|encoding| encoding.number() == number.into())
            .ok_or(Error::Encoding(number))
    }
}

/// A valid message.
#[derive(Clone, Debug)]
pub struct PageSet<'a> {
    /// The purpose.
    pub command: Command,
    /// The binary logarithm of the size of its pages in bytes.
    pub page_shift: u8,
    /// The encoding.
    pub encoding: Encoding,
    /// Whether this is not the last message of its set.
    pub more: bool,
    /// The request that this is an answer to, or 0.
    pub request_id: u64,
    /// The number of pages.
    pub count: u64,
    ranges: RawRanges<'a>,
}

impl<'a> PageSet<'a> {
    /// Reads a message: all bytes that the driver has made readable in a buffer.
    ///
    /// # Errors
    ///
    /// The error in the message.
    pub fn parse(message: &'a [u8]) -> Result<Self, Error> {
        if message.len() > MAX_SIZE {
            return Err(Error::TooLong);
        }
        let (header, payload) = message
            .split_first_chunk::<HEADER_SIZE>()
            .ok_or(Error::Truncated)?;
        let byte = |offset: usize| header.get(offset).copied().unwrap_or_default();
        let command = u16::from_le_bytes(field(header, offset_of!(Header, command)));
        let page_shift = byte(offset_of!(Header, page_shift));
        let encoding = byte(offset_of!(Header, encoding));
        let flags = u32::from_le_bytes(field(header, offset_of!(Header, flags)));
        let request_id = u64::from_le_bytes(field(header, offset_of!(Header, request_id)));
        let first_pfn = u64::from_le_bytes(field(header, offset_of!(Header, first_pfn)));
        let count = u64::from_le_bytes(field(header, offset_of!(Header, count)));

        let command = match u32::from(command) {
            VIRTIO_BALLOON_PAGE_SET_INFLATE => Command::Inflate,
            VIRTIO_BALLOON_PAGE_SET_DEFLATE => Command::Deflate,
            VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP => Command::UnusedSkip,
            VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD => Command::UnusedDiscard,
            _ => return Err(Error::Command(command)),
        };
        let answer = matches!(command, Command::UnusedSkip | Command::UnusedDiscard);
        if answer == (request_id == 0) {
            return Err(Error::RequestId(request_id));
        }
        let end = match page_shift {
            12..64 => 1 << (64 - page_shift),
            _ => return Err(Error::PageShift(page_shift)),
        };
        if flags & !VIRTIO_BALLOON_PAGE_SET_MORE != 0 {
            return Err(Error::Reserved);
        }
        let (encoding, payload) = parse_payload(encoding, payload, first_pfn, end)?;
        let ranges = RawRanges {
            payload,
            least: 0,
            end,
        };
        ranges.check_count(count)?;
        Ok(Self {
            command,
            page_shift,
            encoding,
            more: flags != 0,
            request_id,
            count,
            ranges,
        })
    }

    /// The pages as ranges of page frame numbers, in units of 2^[`page_shift`](Self::page_shift) bytes.
    /// They ascend, none is empty, none overlap, and all end at 2^64 bytes or before.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + use<'a> {
        self.ranges.clone().map_while(Result::ok)
    }
}

/// Whether a message begins with this command.
pub(crate) fn has_command(message: &[u8], command: u32) -> bool {
    let found = message.first_chunk().copied().map(u16::from_le_bytes);
    found.map(u32::from) == Some(command)
}

/// The `N` bytes of a structure from `offset` on.
pub(crate) fn field<const N: usize>(structure: &[u8], offset: usize) -> [u8; N] {
    structure
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

/// Decodes the encoding of pages up to `end`.
fn parse_payload(
    encoding: u8,
    payload: &[u8],
    first_pfn: u64,
    end: u64,
) -> Result<(Encoding, Payload<'_>), Error> {
    let words = payload.chunks_exact(WORD);
    if !words.remainder().is_empty() {
        return Err(Error::Truncated);
    }
    let encoding = Encoding::from_number(encoding)?;
    let payload = match encoding {
        Encoding::Ranges if first_pfn == 0 => Payload::Ranges(words),
        Encoding::Ranges => return Err(Error::Reserved),
        Encoding::Bitmap if first_pfn < end => Payload::Bitmap(Bits::new(first_pfn, words)),
        Encoding::Bitmap => return Err(Error::Overflow),
    };
    Ok((encoding, payload))
}

/// The next word of a payload.
fn next_word(words: &mut ChunksExact<'_, u8>) -> Option<u64> {
    let bytes = words.next()?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

/// The ranges of a message during the check. It ends after an error.
#[derive(Clone, Debug)]
struct RawRanges<'a> {
    payload: Payload<'a>,
    /// The lowest start of the next range.
    least: u64,
    /// The highest end of a range.
    end: u64,
}

impl RawRanges<'_> {
    /// Checks all ranges, and that they have as many pages as the header says.
    fn check_count(&self, said: u64) -> Result<(), Error> {
        let named = self.clone().try_fold(0, |sum, range| {
            range.map(|range| sum + (range.end - range.start))
        })?;
        if named != said {
            return Err(Error::Count { said, named });
        }
        if named == 0 {
            return Err(Error::Empty);
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Payload<'a> {
    Ranges(ChunksExact<'a, u8>),
    Bitmap(Bits<'a>),
}

impl Iterator for RawRanges<'_> {
    type Item = Result<Range<u64>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let range = match &mut self.payload {
            Payload::Ranges(words) => next_range(words)?,
            Payload::Bitmap(bits) => Ok(bits.next()?),
        };
        Some(range.and_then(|range| {
            if range.start < self.least {
                return Err(Error::Disorder);
            }
            if range.end > self.end {
                return Err(Error::Overflow);
            }
            self.least = range.end;
            Ok(range)
        }))
    }
}

/// Takes a range from `words`.
fn next_range(words: &mut ChunksExact<'_, u8>) -> Option<Result<Range<u64>, Error>> {
    let word = next_word(words)?;
    let start = word >> VIRTIO_BALLOON_PAGE_SET_COUNT_BITS;
    let count = match word & ((1 << VIRTIO_BALLOON_PAGE_SET_COUNT_BITS) - 1) {
        0 => match next_word(words) {
            Some(0) => return Some(Err(Error::EmptyRange)),
            Some(count) => count,
            None => return Some(Err(Error::Truncated)),
        },
        count => count,
    };
    Some(
        start
            .checked_add(count)
            .map(|end| start..end)
            .ok_or(Error::Overflow),
    )
}

/// Runs of set bits in a bitmap, each as long as possible.
#[derive(Clone, Debug)]
struct Bits<'a> {
    words: ChunksExact<'a, u8>,
    /// The rest of the current word, and the page of its bit 0.
    word: u64,
    base: u64,
    /// The page of bit 0 of the next word.
    next: u64,
}

impl<'a> Bits<'a> {
    fn new(first: u64, words: ChunksExact<'a, u8>) -> Self {
        Self {
            words,
            word: 0,
            base: first,
            next: first,
        }
    }

    /// Advances to the next word. There is no overflow: a message is short, and its first page is
    /// far below 2^64.
    fn advance(&mut self) -> Option<()> {
        self.word = next_word(&mut self.words)?;
        self.base = self.next;
        self.next += u64::from(u64::BITS);
        Some(())
    }

    /// Clears the lowest run of set bits of the word, from `bit` on, and returns its end.
    fn take_ones(&mut self, bit: u32) -> u32 {
        let end = bit + (self.word >> bit).trailing_ones();
        self.word &= u64::MAX.checked_shl(end).unwrap_or(0);
        end
    }
}

impl Iterator for Bits<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.word == 0 {
            self.advance()?;
        }
        let start = self.word.trailing_zeros();
        let first = self.base + u64::from(start);
        let mut end = self.take_ones(start);
        // A run up to the end of the word may continue in the next word.
        while end == u64::BITS && self.advance().is_some() {
            end = self.take_ones(0);
        }
        Some(first..self.base + u64::from(end))
    }
}

#[cfg(test)]
mod tests;
