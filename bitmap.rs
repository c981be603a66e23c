// SPDX-License-Identifier: GPL-2.0

//! The encoder of page sets: describes the pages of a message in as few bytes as possible.
//!
//! Ranges write a word of 64 bits for each run of pages. A bitmap is shorter for isolated pages
//! that lie close together. A message has one of the two encodings, the shorter one for its pages.
//!
//! The encoder collects the runs of a message as ranges, which are shorter at first. While ranges
//! and bitmap both fit into the buffer, it can convert them in place, without other memory. When
//! the next run would exceed that, it chooses the shorter encoding. Then it adds runs for as long
//! as this encoding stays the shorter one. So no message is longer than with the other encoding.
//! Each message but the last has pages for at least half a buffer of ranges, less a word, which
//! share its header.
//!
//! Nothing here depends on the kernel: `host/wire` compiles this file, too, and tests it with its
//! decoder.
//!
//! Format: docs/protocol.md and `uapi/linux/virtio_balloon_ext.h`.

#![forbid(unsafe_code)]

use crate::rust::{
    mm::pfn_range::PfnRange,
    virtio_balloon::{
        page_set::{
            BITMAP,
            COUNT_BITS,
            MAX_BYTES,
            MORE,
            RANGES, //
        },
        PageSet, //
    }, //
};

/// The number of pages in a word of a bitmap.
const PAGES_PER_WORD: u64 = 64;

/// From this number of pages on, a range needs a second word.
const LONG: u64 = 1 << COUNT_BITS;

/// The length of the longest payload in words.
const MAX_WORDS: usize = (MAX_BYTES - size_of::<PageSet>()) / size_of::<u64>();

/// The length of the shortest payload, in words, that has room for any range.
const MIN_WORDS: usize = 2;

impl PfnRange {
    /// Returns the length as a range, in words.
    fn words(self) -> u64 {
        if self.len() < LONG {
            1
        } else {
            2
        }
    }

    /// Takes the first run from `ranges`.
    fn read(ranges: &mut impl Iterator<Item = u64>) -> Option<Self> {
        let word = ranges.next()?;
        let len = match word & (LONG - 1) {
            0 => ranges.next()?,
            len => len,
        };

        Self::new(word >> COUNT_BITS, len)
    }

    /// Writes the run to the beginning of `ranges`.
    fn write(self, ranges: &mut [u64]) {
        let first = self.first() << COUNT_BITS;

        match ranges {
            [word, ..] if self.len() < LONG => *word = (first | self.len()).to_le(),
            [word, len, ..] => {
                *word = first.to_le();
                *len = self.len().to_le();
            }
            _ => (),
        }
    }

    /// Sets the bits of the run in `bitmap`, which begins with the page `first`.
    fn mark(self, bitmap: &mut [u64], first: u64) {
        let start = self.first().saturating_sub(first);
        let end = self.end().saturating_sub(first);
        let words = index(start / PAGES_PER_WORD)..index(end.div_ceil(PAGES_PER_WORD));
        let head = u64::MAX << (start % PAGES_PER_WORD);
        let tail = u64::MAX >> (end.wrapping_neg() % PAGES_PER_WORD);

        match bitmap.get_mut(words) {
            Some([word]) => *word |= (head & tail).to_le(),
            Some([from, between @ .., to]) => {
                *from |= head.to_le();
                between.fill(u64::MAX);
                *to |= tail.to_le();
            }
            _ => (),
        }
    }
}

/// Returns `words` as an index, or an index out of bounds if it is too large.
fn index(words: u64) -> usize {
    usize::try_from(words).unwrap_or(usize::MAX)
}

/// How pages are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As page frame numbers and numbers of pages.
    Ranges,
    /// As a bitmap from the first page to the last page.
    Bitmap,
}

impl Encoding {
    /// Returns its number in a message.
    fn number(self) -> u8 {
        match self {
            Self::Ranges => RANGES,
            Self::Bitmap => BITMAP,
        }
    }

    /// Returns the encoding with a number.
    #[cfg_attr(test, allow(dead_code, reason = "the host does not need it"))]
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            RANGES => Some(Self::Ranges),
            BITMAP => Some(Self::Bitmap),
            _ => None,
        }
    }
}

/// The length of a message's pages in each encoding, in words.
#[derive(Clone, Copy)]
struct Size {
    ranges: u64,
    bitmap: u64,
}

impl Size {
    fn shorter(self) -> Encoding {
        if self.bitmap < self.ranges {
            Encoding::Bitmap
        } else {
            Encoding::Ranges
        }
    }

    fn of(self, encoding: Encoding) -> u64 {
        match encoding {
            Encoding::Ranges => self.ranges,
            Encoding::Bitmap => self.bitmap,
        }
    }

    fn both(self) -> u64 {
        self.ranges.saturating_add(self.bitmap)
    }
}

/// The header of a message.
#[derive(Clone, Copy)]
pub(crate) struct Subject {
    /// The command.
    pub(crate) command: u16,
    /// The binary logarithm of their size in bytes.
    pub(crate) page_shift: u8,
    /// The request that this is an answer to, or 0.
    pub(crate) request_id: u64,
    /// Whether this is not the last message.
    pub(crate) more: bool,
}

/// A message that is being written.
///
/// The caller owns the buffers: it begins with one, continues with the next when a run does not fit
/// any more, and may stop at any time. No operation in between can fail.
pub(crate) struct Encoder<'a> {
    payload: &'a mut [u64],
    /// The encoding that the caller requests. None: the shorter one.
    forced: Option<Encoding>,
    /// The encoding of the payload: all runs but `last`. A bitmap has zeros after them.
    encoding: Encoding,
    /// The length of the same runs as ranges, in words.
    ranges: u64,
    /// The first page.
    first: u64,
    /// The last run, which may become longer. None: there are no runs.
    last: Option<PfnRange>,
    /// How many pages there are, the last run's included.
    count: u64,
}

impl<'a> Encoder<'a> {
    /// Begins a message, whose payload is written to the start of the buffer. Returns none if there
    /// is no room for any two words.
    ///
    /// All messages have the encoding `forced`, if there is one, for measurements.
    pub(crate) fn new(payload: &'a mut [u64], forced: Option<Encoding>) -> Option<Self> {
        let len = payload.len().min(MAX_WORDS);
        let payload = payload.get_mut(..len).filter(|_| len >= MIN_WORDS)?;
        let encoding = forced.unwrap_or(Encoding::Ranges);

        if encoding == Encoding::Bitmap {
            payload.fill(0);
        }

        Some(Self {
            payload,
            forced,
            encoding,
            ranges: 0,
            first: 0,
            last: None,
            count: 0,
        })
    }

    /// Adds `run`. Returns the part for the next message: nothing, all of it, or the rest if a
    /// bitmap is forced and a single run is too long for it. An empty message takes at least a page
    /// of any run.
    ///
    /// Runs should ascend: one that does not lie after the others needs the next message.
    #[must_use]
    pub(crate) fn push(&mut self, run: PfnRange) -> Option<PfnRange> {
        let (part, rest) = match (self.forced, self.last) {
            (Some(Encoding::Bitmap), None) => self.cut(run),
            _ => (Some(run), None),
        };
        let added = part.is_some_and(|part| self.add(part));

        if added {
            rest
        } else {
            Some(run)
        }
    }

    /// Ends the message. Returns its header and the length of its payload in words, or none if it
    /// has no pages.
    pub(crate) fn finish(mut self, subject: Subject) -> Option<(PageSet, usize)> {
        let last = self.last?;
        let size = self.size(self.ranges, last);

        // Ranges that can no longer become a bitmap are the shorter encoding.
        if self.wanted(size) != self.encoding {
            self.convert();
        }
        self.write(last);

        let first_pfn = match self.encoding {
            Encoding::Ranges => 0,
            Encoding::Bitmap => self.first,
        };
        let flags = if subject.more { MORE } else { 0 };
        let header = PageSet {
            command: subject.command.to_le(),
            page_shift: subject.page_shift,
            encoding: self.encoding.number(),
            flags: flags.to_le(),
            request_id: subject.request_id.to_le(),
            first_pfn: first_pfn.to_le(),
            count: self.count.to_le(),
        };

        Some((header, index(size.of(self.encoding))))
    }

    /// Cuts `run` at the end of the largest bitmap that begins with it. Returns both parts.
    fn cut(&self, run: PfnRange) -> (Option<PfnRange>, Option<PfnRange>) {
        let end = run
            .first()
            .saturating_add(self.room().saturating_mul(PAGES_PER_WORD))
            .min(run.end());

        (
            PfnRange::between(run.first(), end),
            PfnRange::between(end, run.end()),
        )
    }

    /// Adds `run`, if it lies after the others and there is room. Returns whether it was added.
    fn add(&mut self, run: PfnRange) -> bool {
        let Some(last) = self.last else {
            // A single run is never longer as a range, and there is room for any range.
            self.first = run.first();
            self.last = Some(run);
            self.count = run.len();
            return true;
        };

        // Adjacent runs become one run, which may become longer still. Other runs end it.
        let (ended, next) = match run.first().checked_sub(last.end()) {
            Some(0) => (
                None,
                PfnRange::new(last.first(), last.len().saturating_add(run.len())),
            ),
            Some(_) => (Some(last), Some(run)),
            None => return false,
        };
        let Some(next) = next else {
            return false;
        };
        let ranges = self.ranges.saturating_add(ended.map_or(0, PfnRange::words));

        if !self.make_room(self.size(self.ranges, last), self.size(ranges, next)) {
            return false;
        }
        if let Some(ended) = ended {
            self.write(ended);
        }
        self.last = Some(next);
        self.count = self.count.saturating_add(run.len());
        true
    }

    /// Makes room for pages of the size `next`, when those so far have the size `now`. Returns
    /// whether there is room.
    fn make_room(&mut self, now: Size, next: Size) -> bool {
        let wanted = self.wanted(next);

        if next.of(wanted) > self.room() {
            return false;
        }
        if self.encoding == wanted || next.both() <= self.room() {
            return true;
        }
        // The last opportunity to convert, unless it was missed.
        let can = self.encoding == Encoding::Ranges && now.both() <= self.room();

        if can {
            self.convert();
        }
        can
    }

    /// Converts the ranges in the payload into a bitmap. There must be room for both.
    fn convert(&mut self) {
        // Move them out of the way first, to the end of the payload.
        let len = self.payload.len();
        let ranges = index(self.ranges).min(len);
        let start = len - ranges;

        self.payload.copy_within(..ranges, start);
        let (bitmap, ranges) = self.payload.split_at_mut(start);
        let mut words = ranges.iter().copied().map(u64::from_le);

        bitmap.fill(0);
        while let Some(run) = PfnRange::read(&mut words) {
            run.mark(bitmap, self.first);
        }
        ranges.fill(0);
        self.encoding = Encoding::Bitmap;
    }

    /// Writes `run` after the others.
    fn write(&mut self, run: PfnRange) {
        match self.encoding {
            Encoding::Ranges => {
                if let Some(rest) = self.payload.get_mut(index(self.ranges)..) {
                    run.write(rest);
                }
            }
            Encoding::Bitmap => run.mark(self.payload, self.first),
        }
        self.ranges = self.ranges.saturating_add(run.words());
    }

    /// Returns the size of `ranges` words and of the run `last` after them.
    fn size(&self, ranges: u64, last: PfnRange) -> Size {
        Size {
            ranges: ranges.saturating_add(last.words()),
            bitmap: last
                .end()
                .saturating_sub(self.first)
                .div_ceil(PAGES_PER_WORD),
        }
    }

    fn wanted(&self, size: Size) -> Encoding {
        self.forced.unwrap_or(size.shorter())
    }

    /// Returns the maximum number of words of the payload.
    fn room(&self) -> u64 {
        self.payload.len() as u64
    }
}
