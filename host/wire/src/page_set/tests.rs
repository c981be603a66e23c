// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's encoder (bitmap.rs) and this decoder, against each other and each against a reference.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Command, Encoding, Error, HEADER_SIZE, Header, MAX_SIZE, PageSet, WORD};
use crate::bitmap::{self, Encoder, Encodings, Subject};
use crate::pfn_range::PfnRange;

/// The end of the page frame numbers of 4 KiB pages.
const END: u64 = 1 << 52;

/// How many words of payload the longest message has.
const MAX_WORDS: usize = (MAX_SIZE - HEADER_SIZE) / WORD;

/// All encodings, and each alone.
fn choices() -> impl Iterator<Item = Encodings> {
    [Encodings::ALL]
        .into_iter()
        .chain(bitmap::Encoding::ALL.map(Encodings::only))
}

const INFLATE: Subject = Subject {
    command: 1,
    page_shift: 12,
    request_id: 0,
    more: false,
};

/// The bytes of a message.
fn message(header: &Header, payload: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(header.command.to_ne_bytes());
    bytes.extend([header.page_shift, header.encoding]);
    bytes.extend(header.flags.to_ne_bytes());
    for word in [header.request_id, header.first_pfn, header.count] {
        bytes.extend(word.to_ne_bytes());
    }
    for word in payload {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// Encodes runs (first page frame number, length) in buffers with these numbers of words,
/// repeatedly.
fn encode(runs: &[(u64, u64)], buffers: &[usize], allowed: Encodings) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    let mut buffers = buffers.iter().cycle();
    let mut runs = runs
        .iter()
        .map(|&(first, len)| PfnRange::new(first, len).expect("a run that there is"));
    let mut waiting = runs.next();
    while waiting.is_some() {
        // The old content of a buffer must not matter.
        let mut payload = vec![0xa5a5_a5a5_a5a5_a5a5; *buffers.next().expect("a buffer")];
        let mut encoder = Encoder::new(&mut payload, allowed).expect("room for two words");
        while let Some(run) = waiting {
            let rest = encoder.push(run);
            // The rest is the end of the run.
            assert!(rest.is_none_or(|rest| {
                rest.first() + rest.len() == run.first() + run.len() && rest.len() <= run.len()
            }));
            waiting = rest.or_else(|| runs.next());
            if rest.is_some() {
                break;
            }
        }
        let more = waiting.is_some();
        let (header, words) = encoder
            .finish(Subject { more, ..INFLATE })
            .expect("an empty message takes a page");
        messages.push(message(&header, payload.get(..words).expect("the payload")));
    }
    messages
}

/// Runs with adjacent ones merged.
fn joined(runs: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut result: Vec<(u64, u64)> = Vec::new();
    for (first, len) in runs {
        match result.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += len,
            _ => result.push((first, len)),
        }
    }
    result
}

fn runs_of(set: &PageSet<'_>) -> Vec<(u64, u64)> {
    set.ranges()
        .map(|range| (range.start, range.end - range.start))
        .collect()
}

/// The number of words of `runs`, without adjacent ones.
fn size(runs: &[(u64, u64)], encoding: bitmap::Encoding) -> usize {
    match encoding {
        bitmap::Encoding::Ranges => runs
            .iter()
            .map(|run| if run.1 < 4096 { 1 } else { 2 })
            .sum(),
        bitmap::Encoding::Bitmap => {
            let span = match (runs.first(), runs.last()) {
                (Some(first), Some(last)) => last.0 + last.1 - first.0,
                _ => 0,
            };
            usize::try_from(span.div_ceil(64)).expect("64 bits")
        }
    }
}

/// The shortest encoding of the same, and ranges where others are equally short.
fn shortest(runs: &[(u64, u64)], allowed: Encodings) -> bitmap::Encoding {
    assert_eq!(bitmap::Encoding::ALL[0], bitmap::Encoding::Ranges);
    let mut encodings = bitmap::Encoding::ALL.to_vec();
    encodings.retain(|&encoding| allowed.contains(encoding));
    encodings.sort_by_key(|&encoding| size(runs, encoding));
    encodings[0]
}

/// Whether a run may be cut, since no allowed encoding has room for it.
fn may_cut(allowed: Encodings) -> bool {
    !allowed.contains(bitmap::Encoding::Ranges)
}

/// Encodes `runs`, decodes the messages, and checks all of their guarantees.
fn check(runs: &[(u64, u64)], buffers: &[usize], allowed: Encodings) {
    let messages = encode(runs, buffers, allowed);
    let mut decoded = Vec::new();
    let (mut in_ranges, mut payload, mut split) = (0, 0, 0);

    for (number, message) in messages.iter().enumerate() {
        let set = PageSet::parse(message).expect("a message that is right");
        let last = number + 1 == messages.len();
        let its_runs = runs_of(&set);
        let words = (message.len() - HEADER_SIZE) / WORD;
        let room = buffers[number % buffers.len()];
        let ranges = size(&its_runs, bitmap::Encoding::Ranges);
        let encoding = shortest(&its_runs, allowed);

        assert_eq!(set.command, Command::Inflate);
        assert_eq!((set.page_shift, set.request_id), (12, 0));
        assert_eq!(set.more, !last);
        assert_eq!(set.count, its_runs.iter().map(|run| run.1).sum::<u64>());
        assert!(words <= room);
        assert_eq!(joined(its_runs.iter().copied()), its_runs);
        assert_eq!(set.encoding.number(), encoding.number().into());
        assert_eq!(words, size(&its_runs, encoding));
        // Each buffer is at least half full.
        assert!(
            may_cut(allowed) || last || ranges >= room / 2 - 1,
            "{ranges} {room}"
        );
        in_ranges += ranges;
        payload += words;
        split += its_runs
            .first()
            .filter(|first| !runs.iter().any(|run| run.0 == first.0))
            .iter()
            .len();
        decoded.extend(its_runs);
    }

    let expected = joined(runs.iter().copied());
    assert_eq!(joined(decoded), expected);
    assert!(split == 0 || may_cut(allowed));
    if !may_cut(allowed) {
        let least = size(&expected, shortest(&expected, allowed));
        assert!(payload <= least + messages.len());
        let ranges = size(&expected, bitmap::Encoding::Ranges);
        assert!(in_ranges <= ranges + messages.len());
    }
}

/// Runs in ascending order, some of them adjacent: dense, sparse, short, long and mixed.
fn run_lists() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let gap = prop_oneof![8 => 0..4u64, 3 => 0..200u64, 1 => 0..100_000u64, 1 => 0..1u64 << 36];
    let len = prop_oneof![8 => 1..4u64, 3 => 1..200u64, 1 => 4090..4100u64, 1 => 1..1u64 << 20];
    let stripes = (0..4000u64, 1..200u64, 1..200u64).prop_map(|(n, gap, len)| {
        vec![(gap.min(n), len); usize::try_from(n.min(300)).unwrap_or_default()]
    });
    let pieces = prop_oneof![2 => vec((gap, len), 1..400), 1 => stripes];
    (
        prop_oneof![Just(0), 0..1000u64, 0..1u64 << 45],
        pieces,
        any::<bool>(),
    )
        .prop_map(|(start, pieces, at_end)| {
            let mut next = start;
            let mut runs = Vec::new();
            for (gap, len) in pieces {
                runs.push((next + gap, len));
                next += gap + len;
            }
            // Up to the highest page frame numbers, which test limits.
            let shift = if at_end { END - next } else { 0 };
            runs.iter().map(|run| (run.0 + shift, run.1)).collect()
        })
        .prop_filter("one run at least", |runs: &Vec<_>| !runs.is_empty())
}

fn buffer_lists() -> impl Strategy<Value = Vec<usize>> {
    vec(
        prop_oneof![3 => 2..12usize, 2 => 12..100usize, 1 => 500..600usize],
        1..4,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_decoded_is_what_was_encoded(runs in run_lists(), buffers in buffer_lists()) {
        for allowed in choices() {
            // A bitmap of terabytes is too large for a test.
            if !may_cut(allowed) || runs.iter().all(|run| run.1 < 5000) {
                check(&runs, &buffers, allowed);
            }
        }
    }

    #[test]
    fn runs_in_any_order_are_encoded(
        runs in vec((0..2000u64, 1..50u64), 1..50),
        buffers in buffer_lists(),
    ) {
        let mut decoded = Vec::new();
        for message in encode(&runs, &buffers, Encodings::ALL) {
            decoded.extend(runs_of(&PageSet::parse(&message).expect("a message that is right")));
        }
        prop_assert_eq!(joined(decoded), joined(runs));
    }

    #[test]
    fn no_bytes_do_any_harm(
        bytes in vec(any::<u8>(), 0..200),
        command in 0..6u16,
        encoding in 0..4u8,
        page_shift in prop_oneof![Just(12), 0..80u8],
    ) {
        let mut bytes = bytes;
        look_at(&bytes);
        if let Some(start) = bytes.first_chunk_mut::<16>() {
            *start = [0; 16];
            start[..2].copy_from_slice(&command.to_le_bytes());
            start[2] = page_shift;
            start[3] = encoding;
        }
        look_at(&bytes);
        if let Some(ranges) = bytes.get_mut(16..24) {
            ranges.fill(0);
        }
        look_at(&bytes);
    }

    #[test]
    fn a_changed_message_names_nothing_that_it_does_not_say(
        runs in run_lists(),
        buffers in buffer_lists(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop_oneof![Just(0), 0..20usize],
    ) {
        for mut message in encode(&runs, &buffers, Encodings::ALL).into_iter().take(3) {
            for (place, byte) in &changes {
                *place.get_mut(message.as_mut_slice()) = *byte;
            }
            message.truncate(message.len().saturating_sub(cut));
            look_at(&message);
        }
    }
}

/// Reads a message and, if it is valid, decodes it again with a reference: bit by bit, word by
/// word.
fn look_at(message: &[u8]) {
    let mut message = message.to_vec();
    // Few random messages would be valid with a random number of pages.
    if let Err(Error::Count { named, .. }) = PageSet::parse(&message) {
        message[24..HEADER_SIZE].copy_from_slice(&named.to_le_bytes());
    }
    let Ok(set) = PageSet::parse(&message) else {
        return;
    };
    let words: Vec<u64> = message
        .chunks_exact(WORD)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
        .collect();
    let (header, payload) = words.split_at(HEADER_SIZE / WORD);
    let mut named = Vec::new();
    match set.encoding {
        Encoding::Bitmap => {
            for (word, base) in payload.iter().zip((header[2]..).step_by(64)) {
                named.extend(
                    (0..64)
                        .filter(|bit| (word >> bit) & 1 == 1)
                        .map(|bit| (base + bit, 1)),
                );
            }
        }
        Encoding::Ranges => {
            let mut words = payload.iter();
            while let Some(word) = words.next() {
                let len = Some(word % 4096).filter(|&len| len > 0);
                named.push((
                    word / 4096,
                    len.unwrap_or_else(|| *words.next().expect("a length")),
                ));
            }
        }
    }
    assert_eq!(joined(runs_of(&set)), joined(named));

    let limit = 1u128 << 64;
    let mut least = 0;
    let mut count = 0;
    for range in set.ranges() {
        assert!(least <= range.start && range.start < range.end);
        assert!(u128::from(range.end) << set.page_shift <= limit);
        least = range.end;
        count += range.end - range.start;
    }
    assert_eq!((count, header[3]), (set.count, set.count));
    assert_eq!(header[0] >> 33, 0);
    assert!((12..64).contains(&set.page_shift) && message.len() <= MAX_SIZE);
}

/// Checks every set of `bits` pages at a distance of `step` pages, from `base` on: as runs, and
/// page by page.
fn check_every_set(bits: u32, step: u64, base: u64, buffer: usize) {
    for set in 1..1u64 << bits {
        let pages: Vec<_> = (0..u64::from(bits))
            .filter(|bit| (set >> bit) & 1 == 1)
            .map(|bit| (base + bit * step, 1))
            .collect();
        for allowed in choices() {
            check(&joined(pages.iter().copied()), &[buffer], allowed);
            check(&pages, &[buffer], allowed);
        }
    }
}

#[test]
fn every_set_of_a_few_pages_goes_through_every_small_buffer() {
    for buffer in 2..6 {
        check_every_set(10, 1, 0, buffer);
        check_every_set(6, 1, END - 6, buffer);
        // Near the point at which both encodings are equally long.
        for step in [7, 21, 63, 64, 65, 90] {
            check_every_set(10, step, 3, buffer);
        }
    }
}

#[test]
fn every_two_runs_around_the_ends_of_words_go_through_every_small_buffer() {
    let ends = [
        0, 1, 2, 31, 62, 63, 64, 65, 66, 126, 127, 128, 129, 191, 192, 193,
    ];
    for (n, a) in ends.iter().enumerate() {
        for (m, b) in ends.iter().enumerate().skip(n + 1) {
            for (k, c) in ends.iter().enumerate().skip(m) {
                for d in ends.iter().skip(k + 1) {
                    for base in [0, 5, END - 193] {
                        for allowed in choices() {
                            check(&[(base + a, b - a), (base + c, d - c)], &[2], allowed);
                            check(&[(base + a, b - a), (base + c, d - c)], &[3], allowed);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn runs_have_names_up_to_the_end_and_not_beyond() {
    assert!(PfnRange::new(0, END).is_some());
    assert!(PfnRange::new(END - 1, 1).is_some());
    for (first, len) in [
        (0, 0),
        (0, END + 1),
        (END - 1, 2),
        (END, 1),
        (u64::MAX, 1),
        (1, u64::MAX),
    ] {
        assert_eq!(PfnRange::new(first, len), None);
    }
    for allowed in [Encodings::ALL, Encodings::only(bitmap::Encoding::Ranges)] {
        check(&[(0, END)], &[2], allowed);
        check(
            &[(0, 1), (END / 2, 4095), (END - 4097, 4096), (END - 1, 1)],
            &[2, 3],
            allowed,
        );
    }
    check(
        &[(END - 4000, 3000), (END - 1, 1)],
        &[2, 9],
        Encodings::only(bitmap::Encoding::Bitmap),
    );
}

#[test]
fn a_range_takes_a_second_word_from_4096_pages_on() {
    for (len, words) in [(4095, 1), (4096, 2), (4097, 2), (8192, 2)] {
        let messages = encode(&[(7, len)], &[9], Encodings::ALL);
        assert_eq!(messages[0].len(), HEADER_SIZE + words * WORD);
        check(&[(7, 4095), (4102, len - 4094)], &[2], Encodings::ALL);
    }
}

#[test]
fn lone_pages_take_one_bit_for_each_page_of_memory_and_little_more() {
    let runs: Vec<_> = (0..1 << 19).map(|page| (page * 2, 1)).collect();
    let span = runs.len() * 2;
    for (words, part) in [(508, 0.0085), (MAX_WORDS, 0.001)] {
        let bytes: usize = encode(&runs, &[words], Encodings::ALL)
            .iter()
            .map(Vec::len)
            .sum();
        let least = span / 8;
        // Numbers as small as these lose no precision.
        #[allow(clippy::cast_precision_loss)]
        let more = (bytes - least) as f64 / least as f64;
        assert!(more < part, "{more}");
    }
}

#[test]
fn the_encoder_has_the_encodings_of_the_decoder() {
    let encoder = bitmap::Encoding::ALL.map(|encoding| encoding.number().into());
    let decoder = Encoding::ALL.iter().map(|encoding| encoding.number());
    assert!(decoder.eq(encoder));
}

#[test]
fn a_buffer_has_room_for_two_words_at_least() {
    for allowed in choices() {
        assert!(Encoder::new(&mut [], allowed).is_none());
        assert!(Encoder::new(&mut [0], allowed).is_none());
        assert!(
            Encoder::new(&mut [0, 0], allowed)
                .is_some_and(|encoder| encoder.finish(INFLATE).is_none())
        );
    }
}

#[test]
fn without_an_allowed_encoding_messages_are_ranges() {
    let none = Encodings::ALL.filter(|_| false);
    let runs = [(0, 1), (2, 1), (4, 1)];
    assert_eq!(
        encode(&runs, &[9], none),
        encode(&runs, &[9], Encodings::only(bitmap::Encoding::Ranges))
    );
}

#[test]
fn no_message_is_longer_than_a_device_takes() {
    let runs: Vec<_> = (0..10_000).map(|run| (run * 100, 1)).collect();
    let messages = encode(&runs, &[20_000], Encodings::only(bitmap::Encoding::Ranges));
    assert_eq!(messages[0].len(), MAX_SIZE);
    assert_eq!(messages.len(), 2);
}

/// A message by its fields and words.
fn raw(start: [u8; 8], request_id: u64, first_pfn: u64, count: u64, payload: &[u64]) -> Vec<u8> {
    let mut bytes = start.to_vec();
    for word in [request_id, first_pfn, count].iter().chain(payload) {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

#[test]
fn the_format_is_the_documented_one() {
    let ranges = raw(
        [1, 0, 12, 1, 1, 0, 0, 0],
        0,
        0,
        5003,
        &[0x1003, 0x7000, 5000],
    );
    let set = PageSet::parse(&ranges).expect("ranges");
    assert_eq!(set.ranges().collect::<Vec<_>>(), [1..4, 7..5007]);
    assert!(set.more);
    let runs: Vec<_> = [1, 3, 5].map(|page| (page, 1)).to_vec();
    assert_eq!(
        encode(&runs, &[5], Encodings::ALL),
        [raw([1, 0, 12, 2, 0, 0, 0, 0], 0, 1, 3, &[0b10101])]
    );
    let answer = raw(
        [3, 0, 16, 2, 0, 0, 0, 0],
        9,
        62,
        5,
        &[1 | (0b11 << 62), 0b101],
    );
    let set = PageSet::parse(&answer).expect("a bitmap");
    assert_eq!(
        set.ranges().collect::<Vec<_>>(),
        [62..63, 124..127, 128..129].map(|r| r.start..r.end)
    );
    assert_eq!(
        (set.command, set.page_shift, set.request_id),
        (Command::UnusedSkip, 16, 9)
    );
}

#[test]
fn every_error_has_its_name() {
    let ranges = [1, 0, 12, 1, 0, 0, 0, 0];
    let bits = [1, 0, 12, 2, 0, 0, 0, 0];
    let at = |place: usize, value: u8| {
        let mut start = ranges;
        start[place] = value;
        raw(start, 0, 0, 1, &[0x1001])
    };
    let long = vec![0x1001; MAX_WORDS + 1];
    let cases = [
        (vec![], Error::Truncated),
        (at(0, 1)[..31].to_vec(), Error::Truncated),
        (at(0, 1)[..39].to_vec(), Error::Truncated),
        (raw(ranges, 0, 0, 1, &[0x1000]), Error::Truncated),
        (raw(ranges, 0, 0, 1, &long), Error::TooLong),
        (at(0, 0), Error::Command(0)),
        (at(0, 5), Error::Command(5)),
        (at(1, 1), Error::Command(257)),
        (at(2, 11), Error::PageShift(11)),
        (at(2, 64), Error::PageShift(64)),
        (at(3, 0), Error::Encoding(0)),
        (at(3, 3), Error::Encoding(3)),
        (at(4, 2), Error::Reserved),
        (at(7, 128), Error::Reserved),
        (raw(ranges, 0, 1, 1, &[0x1001]), Error::Reserved),
        (raw(ranges, 1, 0, 1, &[0x1001]), Error::RequestId(1)),
        (at(0, 3), Error::RequestId(0)),
        (at(0, 4), Error::RequestId(0)),
        (raw(ranges, 0, 0, 0, &[]), Error::Empty),
        (raw(bits, 0, 9, 0, &[0, 0]), Error::Empty),
        (
            raw(ranges, 0, 0, 1, &[0x1001, 0x3000, 0]),
            Error::EmptyRange,
        ),
        (
            raw(ranges, 0, 0, 2, &[(u64::MAX << 12) | 2]),
            Error::Overflow,
        ),
        (
            raw(ranges, 0, 0, 0, &[u64::MAX << 12, u64::MAX]),
            Error::Overflow,
        ),
        (raw(bits, 0, END, 1, &[1]), Error::Overflow),
        (raw(bits, 0, u64::MAX, 1, &[1]), Error::Overflow),
        (raw(bits, 0, END - 1, 2, &[3]), Error::Overflow),
        (
            raw([1, 0, 63, 1, 0, 0, 0, 0], 0, 0, 1, &[0x2001]),
            Error::Overflow,
        ),
        (raw(ranges, 0, 0, 3, &[0x1002, 0x2001]), Error::Disorder),
        (raw(ranges, 0, 0, 2, &[0x2001, 0x1001]), Error::Disorder),
        (
            raw(ranges, 0, 0, 2, &[0x1001]),
            Error::Count { said: 2, named: 1 },
        ),
        (raw(bits, 0, 1, 2, &[7]), Error::Count { said: 2, named: 3 }),
    ];
    for (message, error) in cases {
        assert_eq!(PageSet::parse(&message).err(), Some(error));
    }
    // Valid messages at the same limits.
    assert!(PageSet::parse(&at(0, 1)).is_ok());
    assert!(PageSet::parse(&raw(bits, 0, END - 1, 1, &[1])).is_ok());
    assert!(PageSet::parse(&raw([1, 0, 63, 1, 0, 0, 0, 0], 0, 0, 2, &[0x0002])).is_ok());
    assert!(PageSet::parse(&raw(ranges, 0, 0, 2, &[0x1001, 0x2001])).is_ok());
}
