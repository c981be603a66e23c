// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Both formats of messages, on both queues, down to the holes.

use super::*;
use crate::budget::Budget;
use crate::memory::balloon::Balloon;
use crate::memory::discard::{Discarder, Granularity, Pieces};
use crate::queues::deflate::Deflate;
use crate::queues::inflate::Inflate;
use crate::queues::virtqueue::{Next, Progress, Receiver, Unfinished, serve};
use crate::testing::GuestQueue;
use balloon_wire::{
    VIRTIO_BALLOON_PAGE_SET_BITMAP, VIRTIO_BALLOON_PAGE_SET_COUNT_BITS,
    VIRTIO_BALLOON_PAGE_SET_DEFLATE, VIRTIO_BALLOON_PAGE_SET_INFLATE,
    VIRTIO_BALLOON_PAGE_SET_RANGES, VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD,
};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::slice;
use vm_memory::{Bytes, GuestAddress};

/// Balloon pages that are not used for the queue and its messages.
const FREE: Range<u64> = 0x100..0x700;

/// The end of memory in balloon pages.
const END: u64 = 0x1000;

/// The end of the address space, in balloon pages.
const LIMIT: u64 = 1 << 52;

/// A huge page in bytes.
const HUGE: u64 = 2 << 20;

/// The format of a driver with all features.
const SETS: Format = Format::PageSets { has_status: true };

/// A page set in its wire format.
#[derive(Clone, Debug)]
struct Message {
    command: u32,
    page_shift: u8,
    encoding: u32,
    flags: u32,
    request_id: u64,
    first_pfn: u64,
    count: u64,
    payload: Vec<u64>,
}

impl Message {
    /// These ranges of balloon pages, for inflating.
    fn ranges(ranges: &[Range<u64>]) -> Self {
        let words = ranges.iter().flat_map(|range| {
            let start = range.start << VIRTIO_BALLOON_PAGE_SET_COUNT_BITS;
            match range.end - range.start {
                count @ 1..4096 => vec![start | count],
                count => vec![start, count],
            }
        });
        Self {
            command: VIRTIO_BALLOON_PAGE_SET_INFLATE,
            page_shift: 12,
            encoding: VIRTIO_BALLOON_PAGE_SET_RANGES,
            flags: 0,
            request_id: 0,
            first_pfn: 0,
            count: ranges.iter().map(|range| range.end - range.start).sum(),
            payload: words.collect(),
        }
    }

    /// One range of balloon pages, for inflating.
    fn range(range: Range<u64>) -> Self {
        Self::ranges(slice::from_ref(&range))
    }

    /// The balloon pages of a bitmap that begins with this one, for inflating.
    fn bitmap(first_pfn: u64, words: &[u64]) -> Self {
        Self {
            encoding: VIRTIO_BALLOON_PAGE_SET_BITMAP,
            first_pfn,
            count: words.iter().map(|word| u64::from(word.count_ones())).sum(),
            payload: words.to_vec(),
            ..Self::ranges(&[])
        }
    }

    fn deflating(self) -> Self {
        Self {
            command: VIRTIO_BALLOON_PAGE_SET_DEFLATE,
            ..self
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let first = u64::from(self.command)
            | (u64::from(self.page_shift) << 16)
            | (u64::from(self.encoding) << 24)
            | (u64::from(self.flags) << 32);
        let header = [first, self.request_id, self.first_pfn, self.count];
        let words = header.iter().chain(&self.payload);
        words.flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// A guest with a queue, and its device.
struct Machine {
    queue: GuestQueue,
    balloon: Balloon,
    /// The driver's last status.
    status: Cell<Option<Status>>,
    told_before_use: bool,
    /// How long a buffer is at most, in bytes.
    cut: usize,
}

impl Machine {
    fn new(granule: u64, told_before_use: bool) -> Self {
        let queue = GuestQueue::new();
        let bytes = vec![1; usize::try_from(FREE.end - FREE.start).unwrap() << 12];
        let start = GuestAddress(FREE.start << 12);
        queue.memory.write_slice(&bytes, start).unwrap();
        let mut balloon = Balloon::default();
        balloon.set_memory(&queue.memory, Granularity::Bytes(granule));
        Self {
            queue,
            balloon,
            status: Cell::default(),
            told_before_use,
            cut: 4096,
        }
    }

    /// Sends a batch of messages, and returns the counters.
    fn send(&mut self, format: Format, kind: Kind, messages: &[Vec<u8>]) -> Counters {
        let before = self.queue.used();
        for message in messages {
            let mut buffers: Vec<_> = message.chunks(self.cut).collect();
            // An empty message has a buffer, too.
            buffers.push(&[]);
            self.queue.send(&buffers);
        }
        let counters = Counters::default();
        let (memory, balloon) = (&self.queue.memory, &mut self.balloon);
        let (pages, pieces) = (&mut Pages::default(), &mut Pieces::default());
        match kind {
            Kind::Inflate => finish(
                &self.queue,
                &counters,
                &mut Inflate {
                    memory,
                    balloon,
                    told_before_use: self.told_before_use,
                    begun: false,
                    discarder: &mut Discarder::default(),
                    format,
                    counters: &counters,
                    pages,
                    pieces,
                    report: &|status| {
                        assert_eq!(self.queue.used(), before);
                        self.status.set(Some(status));
                    },
                },
            ),
            _ => finish(
                &self.queue,
                &counters,
                &mut Deflate {
                    memory,
                    balloon,
                    discarder: &mut Discarder::default(),
                    prefault: false,
                    told_before_use: self.told_before_use,
                    begun: false,
                    format,
                    counters: &counters,
                    pages,
                    pieces,
                },
            ),
        }
        let used = usize::from(self.queue.used() - before);
        assert_eq!(used, messages.len());
        counters
    }

    /// Sends a batch of page sets on the inflate queue.
    fn inflate(&mut self, messages: &[Message]) -> Counters {
        let messages: Vec<_> = messages.iter().map(Message::bytes).collect();
        self.send(SETS, Kind::Inflate, &messages)
    }

    /// Sends a batch of page sets on the deflate queue.
    fn deflate(&mut self, messages: &[Message]) -> Counters {
        let messages: Vec<_> = messages.iter().map(Message::bytes).collect();
        self.send(SETS, Kind::Deflate, &messages)
    }

    /// The discarded pages.
    fn holes(&self) -> BTreeSet<u64> {
        let hole = |&page: &u64| {
            let mut bytes = [1; 4096];
            let start = GuestAddress(page << 12);
            self.queue.memory.read_slice(&mut bytes, start).unwrap();
            bytes == [0; 4096]
        };
        FREE.filter(hole).collect()
    }

    /// Deflates all pages, and returns them.
    fn empty(mut self) -> BTreeSet<u64> {
        let mut held = |page: &u64| {
            let page = *page..*page + 1;
            self.balloon.deflate(&[page]).moved == 1
        };
        (0..END).filter(&mut held).collect()
    }
}

fn finish(guest: &GuestQueue, counters: &Counters, receiver: &mut impl Receiver) {
    let (memory, heads) = (&guest.memory, &mut Vec::new());
    let messages = Counter::default();
    let vring = &mut guest.vring();
    let unfinished = &mut Unfinished::default();
    while serve(
        vring, memory, heads, unfinished, counters, &messages, receiver,
    ) != Next::Notified
    {}
}

#[test]
fn both_encodings_name_pages() {
    let mut machine = Machine::new(4096, true);
    machine.cut = 7;
    let ranges = Message::ranges(&[0x100..0x102, 0x106..0x107]);
    let more = Message {
        flags: 1,
        ..Message::bitmap(0xfe, &[(1 << 4) | (1 << 7), 0, 1])
    };
    let counters = machine.inflate(&[more, ranges]);
    let holes = [0x100, 0x101, 0x102, 0x105, 0x106, 0x17e];
    assert_eq!(machine.holes(), holes.into());
    assert_eq!(counters.inflated.get(), 6 << 12);
    // Adjacent pages of two messages become one range.
    assert_eq!(counters.discards.get(), 3);
    let encodings = [("bitmaps", 1), ("pfns", 0), ("ranges", 1)];
    let encodings = encodings.map(|(name, times)| (name.to_owned(), times));
    assert_eq!(counters.snapshot().encodings, encodings.into());
    assert_eq!(counters.received[0].get(), 2 * 32 + 2 * 8 + 3 * 8);
    assert_eq!(counters.snapshot().refused, [].into());
    assert_eq!(machine.empty(), holes.into());
}

#[test]
fn pages_come_out_in_other_pieces() {
    let mut machine = Machine::new(4096, true);
    machine.inflate(&[Message::range(0x100..0x200)]);
    let bitmap = Message::bitmap(0x100, &[u64::MAX, 1]).deflating();
    let large = Message {
        page_shift: 16,
        ..Message::range(0x1f..0x21).deflating()
    };
    let counters = machine.deflate(&[large, bitmap]);
    assert_eq!(counters.deflated.get(), (65 + 16) << 12);
    assert_eq!(counters.refused(Refusal::NotInBalloon), 1);
    assert_eq!(counters.received[1].get(), 2 * 32 + 8 + 16);
    assert_eq!(machine.empty(), (0x141..0x1f0).collect());
}

#[test]
fn nothing_is_done_for_malformed_messages() {
    let good = || Message::ranges(&[0x100..0x102, 0x104..0x105]);
    let bitmap = |first_pfn| Message::bitmap(first_pfn, &[3]);
    let with = |change: fn(&mut Message)| {
        let mut message = good();
        change(&mut message);
        message.bytes()
    };
    let bytes = good().bytes();
    let malformed = [
        // Too short, and not words.
        vec![],
        bytes[..31].to_vec(),
        bytes[..33].to_vec(),
        [bytes, vec![0]].concat(),
        // Of no page.
        Message::ranges(&[]).bytes(),
        Message::bitmap(0x100, &[0]).bytes(),
        // Fields without a meaning.
        with(|message| message.command = 0),
        with(|message| message.command = 5),
        with(|message| message.page_shift = 11),
        with(|message| message.page_shift = 64),
        with(|message| message.page_shift = u8::MAX),
        with(|message| message.encoding = 0),
        with(|message| message.encoding = 254),
        with(|message| message.flags = 2),
        with(|message| message.request_id = 1),
        with(|message| message.first_pfn = 0x100),
        with(|message| message.count += 1),
        with(|message| message.count = u64::MAX),
        // Of another queue.
        with(|message| message.command = VIRTIO_BALLOON_PAGE_SET_DEFLATE),
        with(|message| {
            message.command = VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD;
            message.request_id = 1;
        }),
        // Ranges without an end, without a page, in disorder, and too far up.
        with(|message| message.payload.push(0x106 << 12)),
        with(|message| message.payload.extend([0x106 << 12, 0])),
        with(|message| message.payload.reverse()),
        Message::ranges(&[0x100..0x102, 0x101..0x103]).bytes(),
        Message::ranges(&[0x100..0x101, LIMIT - 1..LIMIT + 1]).bytes(),
        with(|message| {
            message.payload.extend([u64::MAX << 12, u64::MAX]);
            message.count = message.count.wrapping_add(u64::MAX);
        }),
        bitmap(LIMIT).bytes(),
        bitmap(LIMIT - 1).bytes(),
        bitmap(u64::MAX).bytes(),
    ];
    for (place, message) in malformed.into_iter().enumerate() {
        let batch = [message, Message::range(0x200..0x201).bytes()];
        let mut machine = Machine::new(4096, true);
        let counters = machine.send(SETS, Kind::Inflate, &batch);
        assert_eq!(counters.refused(Refusal::Malformed), 1, "{place}");
        assert_eq!(machine.holes(), [0x200].into(), "{place}");
        assert_eq!(machine.empty(), [0x200].into(), "{place}");
    }
    let mut machine = Machine::new(4096, true);
    machine.inflate(&[Message::range(0x200..0x201)]);
    let counters = machine.deflate(&[Message::range(0x200..0x201)]);
    assert_eq!(counters.refused(Refusal::Malformed), 1);
    assert_eq!(machine.empty(), [0x200].into());
}

/// A status of 5 balloon pages in a message of this length.
fn status(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    (bytes[0], bytes[16]) = (8, 5);
    bytes
}

#[test]
fn a_status_is_for_the_inflate_queue_only() {
    let mut machine = Machine::new(4096, true);
    let page = Message::range(0x200..0x201).bytes();
    let counters = machine.send(SETS, Kind::Inflate, &[status(24), page, status(25)]);
    assert_eq!(counters.refused(Refusal::Malformed), 1);
    let read = machine.status.take();
    assert_eq!(read.map(|status| status.actual), Some(5));
    let counters = machine.send(SETS, Kind::Deflate, &[status(24)]);
    assert_eq!(counters.refused(Refusal::Malformed), 1);
    assert_eq!(machine.status.take(), None);
    assert_eq!(machine.empty(), [0x200].into());
}

#[test]
fn a_driver_without_the_feature_sends_no_status() {
    let mut machine = Machine::new(4096, true);
    let format = Format::PageSets { has_status: false };
    let counters = machine.send(format, Kind::Inflate, &[status(24)]);
    assert_eq!(counters.refused(Refusal::Malformed), 1);
    assert_eq!(machine.status.take(), None);
}

/// The guest may be reset before the device continues with the batch.
#[test]
fn an_unfinished_batch_leaves_no_status() {
    let mut machine = Machine::new(4096, true);
    let mut pages = Pages {
        ranges: vec![0x200..0x201, 0x300..0x301],
        status: Some(Status::default()),
        ..Pages::default()
    };
    let mut inflate = Inflate {
        memory: &machine.queue.memory,
        balloon: &mut machine.balloon,
        told_before_use: true,
        begun: false,
        discarder: &mut Discarder::default(),
        format: SETS,
        counters: &Counters::default(),
        pages: &mut pages,
        pieces: &mut Pieces::default(),
        report: &|status| panic!("{status:?} is reported"),
    };
    assert_eq!(inflate.finish(&mut 0, Budget::spent()), Progress::More);
    assert_eq!(pages.status(), None);
}

#[test]
fn a_format_is_not_taken_for_the_other_one() {
    let mut machine = Machine::new(4096, true);
    let pfns = vec![0, 1, 0, 0, 1, 1, 0, 0];
    let counters = machine.send(SETS, Kind::Inflate, &[pfns]);
    assert_eq!(counters.refused(Refusal::Malformed), 1);
    assert_eq!(machine.empty(), [].into());
    let sets = Feature::PageSets.mask();
    let without = Format::PageSets { has_status: false };
    assert_eq!(Format::of(sets), without);
    assert_eq!(Format::of(sets | Feature::Status.mask()), SETS);
    assert_eq!(Format::of(!Feature::PageSets.mask()), Format::Pfns);
}

#[test]
fn a_message_has_64_kib_at_most() {
    let mut words = vec![0; page_set::MAX_SIZE / 8 - 4];
    words[1] = u64::MAX;
    let mut machine = Machine::new(4096, true);
    let counters = machine.inflate(&[Message::bitmap(0x100, &words)]);
    assert_eq!(counters.snapshot().refused, [].into());
    assert_eq!(machine.holes(), (0x140..0x180).collect());
    words.push(1);
    let counters = machine.inflate(&[Message::bitmap(0x101, &words)]);
    assert_eq!(counters.refused(Refusal::TooLong), 1);
    assert_eq!(machine.empty(), (0x140..0x180).collect());
}

#[test]
fn lone_pages_fill_the_longest_message() {
    let mut words = vec![0x5555_5555_5555_5555; page_set::MAX_SIZE / 8 - 4];
    // These would be the pages of the message, which the device reads again if its time runs out.
    words[28] = 0;
    let mut machine = Machine::new(4096, true);
    let counters = machine.inflate(&[Message::bitmap(0x101, &words)]);
    assert_eq!(counters.inflated.get(), (END - 0x140) << 11);
    assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
    let named = (0x101..END).step_by(2);
    let holes: BTreeSet<_> = named
        .filter(|page| !(0x801..0x841).contains(page))
        .collect();
    assert_eq!(machine.holes(), holes.range(FREE).copied().collect());
    assert_eq!(machine.empty(), holes);
}

#[test]
fn the_largest_numbers_are_outside() {
    let mut machine = Machine::new(HUGE, true);
    let last = Message::range(LIMIT - 1..LIMIT);
    let bits = Message::bitmap(LIMIT - 64, &[u64::MAX]);
    let half = Message {
        page_shift: 63,
        ..Message::bitmap(1, &[1])
    };
    let counters = machine.inflate(&[last, bits, half]);
    assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
    assert_eq!(counters.inflated.get(), 0);
    // All pages from there on, which include the messages.
    let rest = Message::range(0x600..LIMIT);
    let counters = machine.inflate(slice::from_ref(&rest));
    assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
    assert_eq!(counters.inflated.get(), (END - 0x600) << 12);
    assert_eq!(machine.holes(), (0x600..FREE.end).collect());
    let counters = machine.deflate(&[rest.deflating()]);
    assert_eq!(counters.deflated.get(), (END - 0x600) << 12);
    assert_eq!(machine.empty(), [].into());
}

#[test]
fn pages_may_be_larger() {
    for (page_shift, pages, expected) in [
        (16, 0x11..0x13, 0x110..0x130),
        (21, 1..2, 0x200..0x400),
        (21, 1..3, 0x200..0x600),
    ] {
        let ranges = Message {
            page_shift,
            ..Message::range(pages.clone())
        };
        let count = pages.end - pages.start;
        let bitmap = Message {
            page_shift,
            ..Message::bitmap(pages.start, &[(1 << count) - 1])
        };
        for message in [ranges, bitmap] {
            let mut machine = Machine::new(4096, true);
            let counters = machine.inflate(&[message]);
            assert_eq!(counters.discards.get(), 1);
            assert_eq!(machine.holes(), expected.clone().collect());
            assert_eq!(machine.empty(), expected.clone().collect());
        }
    }
}

#[test]
fn what_is_named_again_does_no_harm() {
    let mut machine = Machine::new(4096, true);
    let counters = machine.inflate(&[
        Message::range(0x100..0x108),
        Message::bitmap(0x104, &[0xff]),
    ]);
    assert_eq!(counters.refused(Refusal::AlreadyInBalloon), 1);
    assert_eq!(counters.inflated.get(), 12 << 12);
    assert_eq!(counters.discards.get(), 1);
    let byte = GuestAddress(0x105 << 12);
    machine.queue.memory.write_obj(7_u8, byte).unwrap();
    let counters = machine.inflate(&[Message::range(0x104..0x10d)]);
    assert_eq!(counters.refused(Refusal::AlreadyInBalloon), 1);
    assert_eq!(counters.discarded.get(), 1 << 12);
    assert_eq!(machine.queue.memory.read_obj::<u8>(byte).unwrap(), 7);
}

#[test]
fn a_granule_is_given_back_when_it_is_named_as_a_whole() {
    let first = || Message::range(0x1f0..0x300);
    let second = || Message::bitmap(0x300, &[u64::MAX; 4]);
    let whole: BTreeSet<_> = (0x200..0x400).collect();
    for (told_before_use, batches, expected) in [
        (true, vec![vec![Message::range(0x1f0..0x410)]], &whole),
        (false, vec![vec![Message::range(0x1f0..0x410)]], &whole),
        (true, vec![vec![first(), second()]], &whole),
        (false, vec![vec![first(), second()]], &whole),
        (true, vec![vec![first()], vec![second()]], &whole),
        // The driver may be using the first half by now (PS-V10).
        (false, vec![vec![first()], vec![second()]], &BTreeSet::new()),
    ] {
        let mut machine = Machine::new(HUGE, told_before_use);
        for batch in batches {
            machine.inflate(&batch);
        }
        assert_eq!(machine.holes(), *expected);
    }
}

#[test]
fn a_granule_that_lost_a_page_is_not_given_back() {
    let mut machine = Machine::new(HUGE, true);
    machine.inflate(&[Message::range(0x200..0x3ff)]);
    machine.deflate(&[Message::range(0x210..0x211).deflating()]);
    machine.inflate(&[Message::range(0x3ff..0x400)]);
    assert_eq!(machine.holes(), [].into());
    machine.balloon.empty();
    machine.inflate(&[Message::range(0x210..0x211)]);
    assert_eq!(machine.holes(), [].into(), "a reset forgets the others");
    machine.inflate(&[Message::ranges(&[0x200..0x210, 0x211..0x400])]);
    assert_eq!(machine.holes(), (0x200..0x400).collect());
}

/// The runs of a set of pages.
fn runs(pages: &[u64]) -> Vec<Range<u64>> {
    let runs = pages.chunk_by(|page, next| page + 1 == *next);
    runs.map(|run| run[0]..run[run.len() - 1] + 1).collect()
}

/// A page set of these pages, which ascend.
fn encode(pages: &[u64], bitmap: bool) -> Message {
    let first = pages[0];
    let mut words = Vec::new();
    for page in pages {
        let place = usize::try_from(page - first).unwrap();
        words.resize(place / 64 + 1, 0);
        words[place / 64] |= 1 << (place % 64);
    }
    if bitmap {
        Message::bitmap(first, &words)
    } else {
        Message::ranges(&runs(pages))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The balloon and the discarded pages do not depend on the encoding.
    #[test]
    fn formats_are_equivalent(
        steps in prop::collection::vec((
            any::<bool>(),
            prop::collection::btree_set(FREE, 0..200),
            (FREE, 1_u64..0x300),
            any::<[prop::sample::Index; 2]>(),
            any::<[bool; 2]>(),
        ), 1..6),
        shift in prop::sample::select(vec![12, 14, 21]),
        told_before_use: bool,
        cut in 1024_usize..4096,
    ) {
        let machine = || Machine { cut, ..Machine::new(1 << shift, told_before_use) };
        let (mut by_pfns, mut by_sets) = (machine(), machine());
        for (inflate, mut pages, (first, length), places, bitmaps) in steps {
            pages.extend(first..FREE.end.min(first + length));
            let mut pages: Vec<_> = pages.into_iter().collect();
            let (low, high) = pages.split_at(places[0].index(pages.len()));
            let parts = [low, high].into_iter().zip(bitmaps).filter(|(part, _)| !part.is_empty());
            let sets: Vec<_> = parts.map(|(part, bitmap)| encode(part, bitmap)).collect();
            // In any order.
            let place = places[1].index(pages.len());
            pages.rotate_left(place);
            let pfns = pages.iter().flat_map(|&page| u32::try_from(page).unwrap().to_le_bytes());
            let pfns = [pfns.collect()];
            let counters = if inflate {
                [by_pfns.send(Format::Pfns, Kind::Inflate, &pfns), by_sets.inflate(&sets)]
            } else {
                let sets: Vec<_> = sets.into_iter().map(Message::deflating).collect();
                [by_pfns.send(Format::Pfns, Kind::Deflate, &pfns), by_sets.deflate(&sets)]
            };
            let [pfns, sets] = counters.map(|counters| {
                let counters = counters.snapshot();
                (counters.inflated, counters.deflated, counters.discarded, counters.discards, counters.refused)
            });
            prop_assert_eq!(pfns, sets);
            prop_assert_eq!(by_pfns.holes(), by_sets.holes());
        }
        prop_assert_eq!(by_pfns.empty(), by_sets.empty());
    }
}
