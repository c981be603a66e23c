// SPDX-License-Identifier: GPL-2.0

//! The encoder of page sets: describes the pages of a message in as few bytes as possible.
//!
//! [`Encoding::Ranges`] has a word of 64 bits for each range of pages. A bitmap is shorter for
//! isolated pages that lie close together. A message has one [`Encoding`], the shortest one for its
//! pages of those that the device accepts.
//!
//! The encoder first writes each range of a message as a word, which is shortest for the first
//! ones. While these words and another encoding both fit into the buffer, it can convert them in
//! place, without other memory. When the next range would exceed that, it chooses the shortest
//! encoding. Then it adds ranges for as long as this encoding stays the shortest. So no message is
//! longer than in another encoding. Each message but the last has pages for at least half a buffer
//! of such words, less one, which share its header.
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

    /// Takes the first range from `ranges`.
    fn read(ranges: &mut impl Iterator<Item = u64>) -> Option<Self> {
        let word = ranges.next()?;
        let len = match word & (LONG - 1) {
            0 => ranges.next()?,
            len => len,
        };

        Self::new(word >> COUNT_BITS, len)
    }

    /// Writes the range to the beginning of `ranges`.
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

    /// Sets the bits of the range in `bitmap`, which begins with the page `first`.
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

/// Defines the encodings, each with its number in a message.
macro_rules! encodings {
    ($($(#[$doc:meta])* $encoding:ident = $number:ident;)*) => {
        /// How pages are encoded.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Encoding {
            $($(#[$doc])* $encoding),*
        }

        impl Encoding {
            /// All of them. Of equally short ones, a message has the first.
            pub(crate) const ALL: [Self; [$($number),*].len()] = [$(Self::$encoding),*];

            /// Returns its number in a message.
            pub(crate) const fn number(self) -> u8 {
                match self {
                    $(Self::$encoding => $number),*
                }
            }

            /// Returns the encoding with a number.
            #[cfg_attr(test, allow(dead_code, reason = "the host does not need it"))]
            pub(crate) const fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$encoding),)*
                    _ => None,
                }
            }
        }
    };
}

encodings! {
    /// As page frame numbers and numbers of pages.
    Ranges = RANGES;
    /// As a bitmap from the first page to the last page.
    Bitmap = BITMAP;
}

impl Encoding {
    /// Returns the length of `pages` in words.
    fn words(self, pages: Extent) -> u64 {
        match self {
            Self::Ranges => pages.ranges,
            Self::Bitmap => pages
                .end
                .saturating_sub(pages.first)
                .div_ceil(PAGES_PER_WORD),
        }
    }

    /// Writes `range` to a payload with the pages `before`, which come before it. Unused words of
    /// the payload are 0, unless these are ranges.
    fn write(self, payload: &mut [u64], before: Extent, range: PfnRange) {
        match self {
            Self::Ranges => {
                if let Some(rest) = payload.get_mut(index(before.ranges)..) {
                    range.write(rest);
                }
            }
            Self::Bitmap => range.mark(payload, before.first),
        }
    }

    /// Returns the page frame number in the header of a message with `pages`.
    fn first_pfn(self, pages: Extent) -> u64 {
        match self {
            Self::Ranges => 0,
            Self::Bitmap => pages.first,
        }
    }

    /// Returns the beginning of `range` that fits into `room` words, [`MIN_WORDS`] or more.
    fn part(self, range: PfnRange, room: u64) -> PfnRange {
        let pages = match self {
            Self::Ranges => u64::MAX,
            Self::Bitmap => room.saturating_mul(PAGES_PER_WORD),
        };

        PfnRange::new(range.first(), range.len().min(pages)).unwrap_or(range)
    }
}

/// The encodings that messages may have. [`page_sets`](crate::messages::page_sets) makes it from
/// the features of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Encodings(u8);

impl Encodings {
    /// All encodings.
    pub(crate) const ALL: Self = Self((1 << Encoding::ALL.len()) - 1);

    /// Returns the set of one encoding.
    pub(crate) const fn only(encoding: Encoding) -> Self {
        Self(1 << encoding as u8)
    }

    /// Returns whether `encoding` is in the set.
    pub(crate) const fn contains(self, encoding: Encoding) -> bool {
        self.0 & Self::only(encoding).0 != 0
    }

    /// Returns the set with `encoding`.
    pub(crate) const fn with(self, encoding: Encoding) -> Self {
        Self(self.0 | Self::only(encoding).0)
    }

    /// Returns the encodings of the set for which `is_allowed` holds.
    pub(crate) fn filter(self, is_allowed: impl Fn(Encoding) -> bool) -> Self {
        self.iter()
            .filter(|&encoding| is_allowed(encoding))
            .fold(Self(0), Self::with)
    }

    /// Returns the encodings in the order of [`Encoding::ALL`].
    fn iter(self) -> impl Iterator<Item = Encoding> {
        Encoding::ALL
            .into_iter()
            .filter(move |&encoding| self.contains(encoding))
    }

    /// Returns the shortest encoding of `pages`: ranges, if the set is empty.
    fn shortest(self, pages: Extent) -> Encoding {
        self.iter()
            .min_by_key(|encoding| encoding.words(pages))
            .unwrap_or(Encoding::Ranges)
    }
}

/// The properties of a message's pages that their length depends on.
#[derive(Clone, Copy)]
struct Extent {
    /// The length as ranges, in words.
    ranges: u64,
    /// The first page.
    first: u64,
    /// The end of the last page.
    end: u64,
}

impl Extent {
    /// Returns that of no pages, before the page `first`.
    fn before(first: u64) -> Self {
        Self {
            ranges: 0,
            first,
            end: first,
        }
    }

    /// Returns that of the pages with `range` after them.
    fn with(self, range: PfnRange) -> Self {
        Self {
            ranges: self.ranges.saturating_add(range.words()),
            end: range.end(),
            ..self
        }
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
/// The caller owns the buffers: it begins with one, continues with the next when a range does not
/// fit any more, and may stop at any time. No operation in between can fail.
pub(crate) struct Encoder<'a> {
    payload: &'a mut [u64],
    /// The encodings that the message may have.
    allowed: Encodings,
    /// The encoding of the payload: all ranges but `last`.
    encoding: Encoding,
    /// The same ranges.
    written: Extent,
    /// The last range, which may become longer. None: there are no ranges.
    last: Option<PfnRange>,
    /// How many pages there are, the last range's included.
    count: u64,
}

impl<'a> Encoder<'a> {
    /// Begins a message, whose payload is written to the start of the buffer. Returns none if there
    /// is no room for any two words.
    ///
    /// The message has the shortest encoding in `allowed`. Only ranges can be converted: without
    /// them the message has the first encoding in `allowed`.
    pub(crate) fn new(payload: &'a mut [u64], allowed: Encodings) -> Option<Self> {
        let len = payload.len().min(MAX_WORDS);
        let payload = payload.get_mut(..len).filter(|_| len >= MIN_WORDS)?;
        let nothing = Extent::before(0);
        let encoding = allowed.shortest(nothing);
        let allowed = if encoding == Encoding::Ranges {
            allowed
        } else {
            payload.fill(0);
            Encodings::only(encoding)
        };

        Some(Self {
            payload,
            allowed,
            encoding,
            written: nothing,
            last: None,
            count: 0,
        })
    }

    /// Adds `range`. Returns the part for the next message: nothing, all of it, or the rest if a
    /// single range is too long for the only allowed encoding. An empty message takes at least a
    /// page of any range.
    ///
    /// Ranges should ascend: one that does not lie after the others needs the next message.
    #[must_use]
    pub(crate) fn push(&mut self, range: PfnRange) -> Option<PfnRange> {
        let part = match self.last {
            None => self.encoding.part(range, self.room()),
            Some(_) => range,
        };

        if self.add(part) {
            PfnRange::between(part.end(), range.end())
        } else {
            Some(range)
        }
    }

    /// Ends the message. Returns its header and the length of its payload in words, or none if it
    /// has no pages.
    pub(crate) fn finish(mut self, subject: Subject) -> Option<(PageSet, usize)> {
        let last = self.last?;
        let pages = self.written.with(last);

        // Ranges that can no longer be converted are the shortest encoding.
        let wanted = self.allowed.shortest(pages);
        if wanted != self.encoding {
            self.convert(wanted);
        }
        self.write(last);

        let flags = if subject.more { MORE } else { 0 };
        let header = PageSet {
            command: subject.command.to_le(),
            page_shift: subject.page_shift,
            encoding: self.encoding.number(),
            flags: flags.to_le(),
            request_id: subject.request_id.to_le(),
            first_pfn: self.encoding.first_pfn(pages).to_le(),
            count: self.count.to_le(),
        };

        Some((header, index(self.encoding.words(pages))))
    }

    /// Adds `range`, if it lies after the others and there is room. Returns whether it was added.
    fn add(&mut self, range: PfnRange) -> bool {
        let Some(last) = self.last else {
            // There is room for any range, and for the part of a range in another encoding.
            self.written = Extent::before(range.first());
            self.last = Some(range);
            self.count = range.len();
            return true;
        };

        // Adjacent ranges become one range, which may become longer still. Other ranges end it.
        let (ended, next) = match range.first().checked_sub(last.end()) {
            Some(0) => (
                None,
                PfnRange::new(last.first(), last.len().saturating_add(range.len())),
            ),
            Some(_) => (Some(last), Some(range)),
            None => return false,
        };
        let Some(next) = next else {
            return false;
        };
        let before = ended.map_or(self.written, |ended| self.written.with(ended));

        if !self.make_room(self.written.with(last), before.with(next)) {
            return false;
        }
        if let Some(ended) = ended {
            self.write(ended);
        }
        self.last = Some(next);
        self.count = self.count.saturating_add(range.len());
        true
    }

    /// Makes room for the pages `next`, which are those so far, `now`, and others. Returns whether
    /// there is room.
    fn make_room(&mut self, now: Extent, next: Extent) -> bool {
        let wanted = self.allowed.shortest(next);

        if wanted.words(next) > self.room() {
            return false;
        }
        if self.encoding == wanted || self.can_convert(wanted, next) {
            return true;
        }
        // The last opportunity to convert, unless it was missed.
        let can = self.can_convert(wanted, now);

        if can {
            self.convert(wanted);
        }
        can
    }

    /// Returns whether a payload of `pages` can be converted: there is room for both encodings.
    fn can_convert(&self, wanted: Encoding, pages: Extent) -> bool {
        let both = Encoding::Ranges
            .words(pages)
            .saturating_add(wanted.words(pages));

        self.encoding == Encoding::Ranges && both <= self.room()
    }

    /// Converts the ranges in the payload. There must be room for both encodings.
    fn convert(&mut self, wanted: Encoding) {
        // Move them out of the way first, to the end of the payload.
        let len = self.payload.len();
        let ranges = index(self.written.ranges).min(len);
        let start = len - ranges;

        self.payload.copy_within(..ranges, start);
        let (converted, ranges) = self.payload.split_at_mut(start);
        let mut words = ranges.iter().copied().map(u64::from_le);
        let mut before = Extent::before(self.written.first);

        converted.fill(0);
        while let Some(range) = PfnRange::read(&mut words) {
            wanted.write(converted, before, range);
            before = before.with(range);
        }
        ranges.fill(0);
        self.encoding = wanted;
    }

    /// Writes `range` after the others.
    fn write(&mut self, range: PfnRange) {
        self.encoding.write(self.payload, self.written, range);
        self.written = self.written.with(range);
    }

    /// Returns the maximum number of words of the payload.
    fn room(&self) -> u64 {
        self.payload.len() as u64
    }
}
