// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hostile guest, for the targets that serve a queue of one.
//!
//! The guest has two regions of memory in a file, which is larger than both. Sets of its pages are bits of
//! a number, where a bit stands for the page at this place in the file:
//!
//! | in the file, in pages | in the guest, in pages |
//! |-----------------------|------------------------|
//! | 0 to 3                | not there              |
//! | 3 to 20               | 0 to 17                |
//! | 20 to 33              | 32 to 45               |
//! | 33 to 36              | not there              |
//!
//! The fuzzer's bytes are an [`Input`]: settings, and the content of the first region. That begins with a
//! queue of 8 descriptors: the table at 0, the available ring at 0x80, and the used ring at 0xa0. Messages
//! usually follow, from 0x100 on.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};

use balloon_wire::page_set::PageSet;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_backend::{VringMutex, VringState, VringT};
use vhost_user_balloon::budget::Budget;
use vhost_user_balloon::counters::{Counter, Counters};
use vhost_user_balloon::memory::balloon::Balloon;
use vhost_user_balloon::memory::discard::{Granularity, Pieces};
use vhost_user_balloon::queues::pages::Format;
use vhost_user_balloon::queues::virtqueue::{Chain, Next, Progress, Receiver, Unfinished, serve};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// A balloon page in bytes.
pub const PAGE: u64 = 4096;

/// The guest's memory in pages.
pub const PAGES: u64 = 30;

/// A region: its pages in the file, and the first one in the guest.
const REGIONS: [(Range<u64>, u64); 2] = [(3..20, 0), (20..33, 32)];

/// The end of the guest's memory in pages.
const END: u128 = 45;

/// The file in pages.
const FILE_PAGES: usize = 36;

/// The content of memory that the fuzzer does not fill.
const PATTERN: u8 = 0xa5;

const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x80;
const USED: u64 = 0xa0;
/// The used ring in the file: flags, index, elements, and the event index.
const USED_IN_FILE: Range<usize> = 3 * 4096 + 0xa0..3 * 4096 + 0xa0 + 4 + 8 * 8 + 2;

/// The available ring's index in the file.
const AVAIL_INDEX_IN_FILE: Range<usize> = 3 * 4096 + 0x82..3 * 4096 + 0x84;

/// The largest message of page frame numbers that the device accepts, in bytes.
const LONGEST_MESSAGE: usize = 256 << 10;

/// All inputs share the memory, since mapping it takes longer than filling it.
static MACHINE: LazyLock<(Arc<File>, GuestMemoryMmap)> = LazyLock::new(|| {
    let file = File::from(memfd_create("guest", MFdFlags::empty()).expect("memory for a guest"));
    let file = Arc::new(file);
    file.set_len(FILE_PAGES as u64 * PAGE).expect("its size");
    let regions = REGIONS.map(|(pages, first)| {
        let bytes = ((pages.end - pages.start) * PAGE) as usize;
        let place = FileOffset::from_arc(Arc::clone(&file), pages.start * PAGE);
        (GuestAddress(first * PAGE), bytes, Some(place))
    });
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).expect("its mapping");
    (file, memory)
});

/// The decoded bytes of the fuzzer.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The granule in pages: 1, 2, 4 or 8.
    pub granule: u64,
    /// Whether the queue has event indexes.
    event_index: bool,
    /// An option of the target.
    pub option: bool,
    /// The encoding of messages that list pages.
    pub format: Format,
    /// Where the queue begins.
    index: u16,
    /// A word whose meaning depends on the target.
    pub word: u64,
    image: &'a [u8],
}

impl<'a> Input<'a> {
    /// Takes the bytes apart, if there are enough.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let (&[settings, low, high], rest) = bytes.split_first_chunk()?;
        let (&word, image) = rest.split_first_chunk()?;
        Some(Self {
            granule: 1 << (settings & 3),
            event_index: settings & 4 != 0,
            option: settings & 8 != 0,
            format: match settings & 16 {
                0 => Format::Pfns,
                _ => Format::PageSets {
                    has_status: settings & 32 != 0,
                },
            },
            index: u16::from_le_bytes([low, high]),
            word: u64::from_le_bytes(word),
            image,
        })
    }
}

/// The guest, with one queue.
pub struct Guest {
    /// Its memory.
    pub memory: GuestMemoryMmap,
    file: Arc<File>,
    content: Vec<u8>,
    granule: u64,
    format: Format,
    vring: VringMutex,
}

impl Guest {
    /// A guest whose memory is filled.
    pub fn new(input: Input<'_>) -> Self {
        let (file, memory) = &*MACHINE;
        let mut content = vec![PATTERN; FILE_PAGES * PAGE as usize];
        let (first, _) = &REGIONS[0];
        let filled = &mut content[(first.start * PAGE) as usize..(first.end * PAGE) as usize];
        let length = input.image.len().min(filled.len());
        filled[..length].copy_from_slice(&input.image[..length]);
        file.write_all_at(&content, 0).expect("a write to memory");

        let atomic = GuestMemoryAtomic::new(memory.clone());
        let vring = VringMutex::new(atomic, SIZE).expect("a queue");
        vring
            .set_queue_info(DESCRIPTORS, AVAIL, USED)
            .expect("a place for it");
        vring.set_queue_next_avail(input.index);
        vring.set_queue_next_used(input.index);
        vring.set_queue_event_idx(input.event_index);
        vring.set_queue_ready(true);
        Self {
            memory: memory.clone(),
            file: Arc::clone(file),
            content,
            granule: input.granule,
            format: input.format,
            vring,
        }
    }

    /// A balloon of the guest that has these pages.
    pub fn balloon(&self, held: u64) -> Balloon {
        let mut balloon = Balloon::default();
        balloon.set_memory(&self.memory, Granularity::Bytes(self.granule * PAGE));
        balloon.inflate(&ranges(held), &mut Pieces::default());
        balloon
    }

    fn load(&self, address: u64) -> u16 {
        let value = self.memory.read_obj(GuestAddress(address));
        u16::from_le(value.expect("the rings are in memory"))
    }

    /// Makes more messages available.
    pub fn publish(&mut self, messages: u16) {
        let index = self.load(AVAIL + 2).wrapping_add(messages).to_le_bytes();
        let place = GuestAddress(AVAIL + 2);
        self.memory
            .write_slice(&index, place)
            .expect("the rings are in memory");
        self.content[AVAIL_INDEX_IN_FILE].copy_from_slice(&index);
    }

    /// Makes the device serve the queue, and checks that it uses each message once. Returns the number of
    /// used messages.
    pub fn watch(&self, act: impl FnOnce(&mut VringState)) -> u16 {
        let slot = |index: u16| u64::from(index % SIZE);
        let (avail, used) = self.position();
        let heads: Vec<_> = (0..SIZE)
            .map(|n| self.load(AVAIL + 4 + 2 * slot(avail.wrapping_add(n))))
            .collect();

        let (taken, completed) = self.act(act);
        let new_used = used.wrapping_add(completed);
        let taken = usize::from(taken);
        let expected = heads[..taken].iter().copied().filter(|&head| head < SIZE);
        let found: Vec<_> = (0..completed)
            .map(|n| self.load(USED + 4 + 8 * slot(used.wrapping_add(n))))
            .collect();
        assert_eq!(found, expected.collect::<Vec<_>>(), "messages came back");
        if completed > 0 {
            assert_eq!(
                self.load(USED + 2),
                new_used,
                "the guest is notified of them"
            );
        }
        completed
    }

    /// The device's position in the available and in the used ring.
    fn position(&self) -> (u16, u16) {
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        (queue.next_avail(), queue.next_used())
    }

    /// Makes the device serve the queue, and returns how many messages it takes and how many it
    /// uses.
    pub fn act(&self, act: impl FnOnce(&mut VringState)) -> (u16, u16) {
        let (avail, used) = self.position();
        act(&mut self.vring.get_mut());
        let (new_avail, new_used) = self.position();
        let taken = new_avail.wrapping_sub(avail);
        assert!(taken <= SIZE, "{taken} messages taken");
        (taken, new_used.wrapping_sub(used))
    }

    /// Makes the device serve the queue until it is empty, and returns the messages.
    pub fn serve(&self, counters: &Counters, receiver: &mut impl Receiver) -> Seen {
        let mut seen = Seen::default();
        let mut unfinished = Unfinished::default();
        loop {
            let mut witness = Witness {
                memory: &self.memory,
                format: self.format,
                receiver,
                seen: &mut seen,
            };
            let (mut next, messages) = (Next::Notified, Counter::default());
            self.watch(|vring| {
                let heads = &mut Vec::new();
                next = serve(
                    vring,
                    &self.memory,
                    heads,
                    &mut unfinished,
                    counters,
                    &messages,
                    &mut witness,
                );
            });
            if next == Next::Notified {
                return seen;
            }
            assert!(
                messages.get() > 0,
                "the device reports work on an empty queue"
            );
        }
    }

    /// Checks that only these pages of the file have changed, and that they are holes. Returns the number
    /// of discarded bytes. The device may write to the used ring.
    pub fn check_holes(&self, allowed: u64) -> u64 {
        let mut before = self.content.clone();
        let mut after = vec![0; before.len()];
        self.file
            .read_exact_at(&mut after, 0)
            .expect("a read of memory");
        before[USED_IN_FILE].fill(0);
        after[USED_IN_FILE].fill(0);
        let pages = || before.chunks(4096).zip(after.chunks(4096));
        let mut gone = 0;
        for (page, (_, after)) in (0..).zip(pages()).filter(|(_, (old, new))| old != new) {
            assert!(after.iter().all(|&byte| byte == 0), "page {page} is torn");
            assert!(allowed & (1 << page) != 0, "page {page} was not named");
            gone += PAGE;
        }
        gone
    }

    /// How many bytes of the guest's memory have changed, without those of the used ring. Checks
    /// that no other bytes have changed.
    pub fn changed(&self) -> u64 {
        let mut after = vec![0; self.content.len()];
        self.file
            .read_exact_at(&mut after, 0)
            .expect("a read of memory");
        let bytes = self.content.iter().zip(&after).enumerate();
        let changed =
            bytes.filter(|(place, (old, new))| old != new && !USED_IN_FILE.contains(place));
        let inside = |place: usize| {
            let page = place as u64 / PAGE;
            REGIONS.iter().any(|(pages, _)| pages.contains(&page))
        };
        changed
            .inspect(|&(place, _)| assert!(inside(place), "byte {place} is not the guest's"))
            .count() as u64
    }

    /// The pages of the granules that are completely in a set and in a region.
    pub fn whole(&self, set: u64) -> u64 {
        let granule = |page: u64| page / self.granule * self.granule;
        REGIONS
            .into_iter()
            .flat_map(|(pages, _)| {
                let all = pages.clone();
                pages.filter(move |&page| {
                    (granule(page)..granule(page) + self.granule)
                        .all(|page| all.contains(&page) && set & (1 << page) != 0)
                })
            })
            .fold(0, |pages, page| pages | (1 << page))
    }
}

/// The content of messages.
#[derive(Debug, Default)]
pub struct Seen {
    /// Their buffers.
    pub buffers: Vec<Descriptor>,
    /// The pages that they listed. Invalid messages may be among them.
    pub named: u64,
}

/// Reads messages before the device does, since they may be overwritten later.
struct Witness<'a, R> {
    memory: &'a GuestMemoryMmap,
    format: Format,
    receiver: &'a mut R,
    seen: &'a mut Seen,
}

impl<R: Receiver> Receiver for Witness<'_, R> {
    fn take(&mut self, chain: Chain<'_>, again: bool) -> bool {
        let buffers: Vec<_> = chain.clone().collect();
        let content = read(self.memory, &buffers).unwrap_or_default();
        self.seen.named |= match self.format {
            Format::Pfns => named_by_pfns(&content),
            Format::PageSets { .. } => named_by_page_set(&content),
        };
        self.seen.buffers.extend(buffers);
        self.receiver.take(chain, again)
    }

    // A message lists the same pages in each turn, so one copy is enough.
    fn finish(&mut self, done: &mut u64, _budget: Budget) -> Progress {
        self.receiver.finish(done, Budget::UNLIMITED)
    }
}

/// The pages of an array of page frame numbers.
fn named_by_pfns(message: &[u8]) -> u64 {
    let numbers = message.chunks_exact(4);
    numbers.fold(0, |pages, number| {
        let number = u32::from_le_bytes(number.try_into().expect("4 bytes"));
        pages | page(number.into())
    })
}

/// The pages of a page set, which has none if it is malformed.
fn named_by_page_set(message: &[u8]) -> u64 {
    let Ok(set) = PageSet::parse(message) else {
        return 0;
    };
    let size = 1_u128 << set.page_shift;
    let first = |number: u64| u128::from(number) * size / u128::from(PAGE);
    set.ranges()
        .flat_map(|range| first(range.start)..first(range.end).min(END))
        .fold(0, |pages, number| pages | page(number as u64))
}

/// The content of a message's buffers, if it is readable and not too long.
fn read(memory: &GuestMemoryMmap, buffers: &[Descriptor]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for buffer in buffers.iter().filter(|buffer| !buffer.is_write_only()) {
        let start = bytes.len();
        let end = start + buffer.len() as usize;
        if end > LONGEST_MESSAGE {
            return None;
        }
        bytes.resize(end, 0);
        memory.read_slice(&mut bytes[start..], buffer.addr()).ok()?;
    }
    Some(bytes)
}

/// The set with a page of the guest, which is empty if there is no such page.
pub fn page(number: u64) -> u64 {
    REGIONS
        .into_iter()
        .find_map(|(pages, first)| {
            let page = pages.start + number.checked_sub(first)?;
            pages.contains(&page).then(|| 1 << page)
        })
        .unwrap_or(0)
}

/// Only the pages of the set that are in the guest's memory.
pub fn in_memory(set: u64) -> u64 {
    set & ranges(u64::MAX)
        .into_iter()
        .flatten()
        .fold(0, |pages, number| pages | page(number))
}

/// The guest's numbers of the pages of a set, a range for each page.
pub fn ranges(set: u64) -> Vec<Range<u64>> {
    REGIONS
        .into_iter()
        .flat_map(|(pages, first)| {
            let start = pages.start;
            pages
                .filter(move |&page| set & (1 << page) != 0)
                .map(move |page| first + page - start..first + page - start + 1)
        })
        .collect()
}

/// How much memory a set is, in bytes.
pub fn bytes(set: u64) -> u64 {
    u64::from(set.count_ones()) * PAGE
}
