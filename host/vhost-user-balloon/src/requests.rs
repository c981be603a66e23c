// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host requests: the device asks, the guest's driver answers (docs/protocol.md, section 5).
//!
//! Buffers are used in the order in which they were made available, and one for a request stays in the
//! available ring until there is something to ask for: it is only looked at. One that a message of an answer
//! comes behind is used without a request in it, and the driver makes it available again (HR-V9). So the used
//! ring says where the queue goes on, for a front end that stops it as for another process that takes it up,
//! and there is nothing of the guest's that could get lost meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::time::SystemTime;

use balloon_control::{Progress, Ranges, RequestStatus};
use balloon_wire::page_set::{self, PageSet};
use balloon_wire::request::{self, Command, Message, Status};
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_PFN_SHIFT};
use log::debug;
use vhost_user_backend::VringState;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::balloon::Balloon;
use crate::counters::{Counter, Counters, Refusal};
use crate::device::lock;
use crate::discard::{Discarder, Pieces};
use crate::page_map::PageMap;
use crate::queue::{Budget, Chain, MAX_BATCH, Next, buffers, complete, read, wants_notification};

/// How many requests are kept, open ones and those whose answers can be read. Cancels are not among them, of
/// which there can be as many.
const MAX_REQUESTS: usize = 4;

/// How many ranges of pages are told at once: many less than a client takes in an answer.
const MAX_RANGES: usize = 8192;

/// The size of a request in bytes.
const REQUEST: u32 = 32;
const _: () = assert!(request::SIZE == 32);

/// A request, with what became of it.
#[derive(Debug)]
struct Kept {
    command: Command,
    status: RequestStatus,
    /// How much memory the answer has named, in bytes.
    named: u64,
    /// How much of it was given back to the host, in bytes.
    discarded: u64,
    /// The pages that it has named, if they can be read.
    pages: PageMap,
}

impl Kept {
    fn is_cancel(&self) -> bool {
        matches!(self.command, Command::Cancel { .. })
    }
}

/// There are so many open requests that another one cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The requests of a device.
#[derive(Debug)]
pub struct Requests {
    /// By their ids.
    kept: BTreeMap<u64, Kept>,
    /// The last id that was given out.
    last: u64,
    /// Where the queue's available ring is to be read next.
    position: Option<u16>,
    /// Whether the queue was served since it was started.
    at_work: bool,
}

impl Default for Requests {
    /// The guest may still answer requests of a process that has had the device before: ids begin with the
    /// clock's microseconds, which that one has left behind.
    fn default() -> Self {
        let clock = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self::after(u64::try_from(clock.as_micros()).unwrap_or_default())
    }
}

impl Requests {
    /// No requests yet. The first id that is given out is the one after `last`.
    pub fn after(last: u64) -> Self {
        Self {
            kept: BTreeMap::new(),
            last,
            position: None,
            at_work: false,
        }
    }

    /// Has the guest be asked for something, as soon as there is a buffer for it. `pages` is where the pages of
    /// the answer are to be kept. Returns the id of the request.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn begin(&mut self, command: Command, pages: PageMap) -> Result<u64, TooMany> {
        let kept = Kept {
            command,
            status: RequestStatus::Waiting,
            named: 0,
            discarded: 0,
            pages,
        };
        let alike = |other: &&Kept| other.is_cancel() == kept.is_cancel();
        if self.kept.values().filter(alike).count() >= MAX_REQUESTS {
            let ended = self.kept.iter().find(|(_, kept)| kept.status.is_end());
            let (&oldest, _) = ended.filter(|_| !kept.is_cancel()).ok_or(TooMany)?;
            self.kept.remove(&oldest);
        }
        loop {
            self.last = self.last.wrapping_add(1);
            // HR-V1
            if self.last != 0 && !self.kept.contains_key(&self.last) {
                break;
            }
        }
        self.kept.insert(self.last, kept);
        Ok(self.last)
    }

    /// Has the guest be told that a request is no longer wanted, if it has not ended.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn cancel(&mut self, id: u64) -> Result<(), TooMany> {
        let command = Command::Cancel { id };
        match self.kept.get_mut(&id) {
            Some(kept) if kept.status == RequestStatus::Waiting => {
                kept.status = RequestStatus::Cancelled;
            }
            Some(kept) if kept.status == RequestStatus::Open => {
                if !self.kept.values().any(|kept| kept.command == command) {
                    self.begin(command, PageMap::default())?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What a client asked for with this id, and not by way of a cancel.
    fn find(&self, id: u64) -> Option<&Kept> {
        self.kept.get(&id).filter(|kept| !kept.is_cancel())
    }

    /// How far the guest is with a request.
    pub fn progress(&self, id: u64) -> Option<Progress> {
        self.find(id).map(|kept| Progress {
            id,
            status: kept.status,
            named: kept.named,
            discarded: kept.discarded,
        })
    }

    /// Unused memory that the guest has named, from an address on.
    pub fn ranges(&self, id: u64, from: u64) -> Option<Ranges> {
        let pages = &self.find(id)?.pages;
        let bytes = |pages: u64| pages.saturating_mul(BALLOON_PAGE_SIZE);
        let mut rest = pages.ranges(from.div_ceil(BALLOON_PAGE_SIZE));
        let ranges = rest.by_ref().take(MAX_RANGES);
        Some(Ranges {
            id,
            end: bytes(pages.end()),
            ranges: ranges
                .map(|range| (bytes(range.start), bytes(range.end - range.start)))
                .collect(),
            next: rest.next().map(|range| bytes(range.start)),
        })
    }

    /// How many requests the guest is to answer.
    pub fn open(&self) -> u64 {
        self.kept
            .values()
            .filter(|kept| !kept.status.is_end())
            .fold(0, |open, _| open + 1)
    }

    /// The next one that the guest is to be asked.
    fn waiting(&mut self) -> Option<(u64, &mut Kept)> {
        self.kept
            .iter_mut()
            .find(|(_, kept)| kept.status == RequestStatus::Waiting)
            .map(|(&id, kept)| (id, kept))
    }

    /// The request that a message belongs to (HR-V6).
    fn of(&mut self, set: &PageSet<'_>) -> Result<&mut Kept, Refusal> {
        self.kept
            .get_mut(&set.request_id)
            .filter(|kept| kept.status == RequestStatus::Open)
            .filter(|kept| kept.command.names() == Some(set.command))
            .ok_or(Refusal::Malformed)
    }

    /// Takes note that the guest has ended an answer.
    fn end(&mut self, id: u64, status: Status, counters: &Counters) -> Result<(), Refusal> {
        let kept = self.kept.get_mut(&id);
        let kept = kept.filter(|kept| kept.status == RequestStatus::Open);
        let kept = kept.ok_or(Refusal::Malformed)?;
        kept.status = match status {
            Status::Complete => RequestStatus::Complete,
            Status::Aborted => RequestStatus::Aborted,
            Status::Cancelled => RequestStatus::Cancelled,
            Status::Unsupported => RequestStatus::Unsupported,
            Status::Malformed => RequestStatus::Malformed,
            Status::UnknownId => RequestStatus::UnknownId,
        };
        counters.answered(kept.status);
        if kept.is_cancel() {
            self.kept.remove(&id);
        }
        Ok(())
    }

    /// Ends what the guest does not answer any more, as it was reset (HR-V8).
    fn reset(&mut self, counters: &Counters) {
        for kept in self.kept.values_mut() {
            if kept.status == RequestStatus::Open {
                kept.status = RequestStatus::Reset;
                counters.answered(kept.status);
            }
        }
        self.kept.retain(|_, kept| !kept.is_cancel());
    }

    /// Takes note that the queue begins anew, at another index if the driver is a new one.
    pub fn restart(&mut self) {
        self.at_work = false;
    }

    /// Takes note that the guest is gone, and nobody will answer what it was to be asked.
    pub fn disconnect(&mut self, counters: &Counters) {
        self.restart();
        self.reset(counters);
        let rest = self.kept.values_mut();
        for kept in rest.filter(|kept| !kept.status.is_end()) {
            kept.status = RequestStatus::Reset;
        }
    }

    /// The queue is to be read from `next` on. A driver that has seen a request is past index 0, and one that was
    /// reset begins there.
    fn start(&mut self, next: u16, counters: &Counters) {
        if !self.at_work && (next == 0 || self.position != Some(next)) {
            self.reset(counters);
        }
        self.at_work = true;
    }
}

/// What serves the queue.
#[derive(Debug)]
pub struct Answers<'a> {
    /// The guest's memory, where the messages are.
    pub memory: &'a GuestMemoryMmap,
    /// What is asked for. Not locked while memory is given back, which takes its time.
    pub requests: &'a Mutex<Requests>,
    /// The guest's memory.
    pub balloon: &'a Balloon,
    /// What gives memory back to the host.
    pub discarder: &'a mut Discarder,
    /// What is counted.
    pub counters: &'a Counters,
    /// Whether the guest relies on what its free pages hold. Then they are left alone: a hole reads as
    /// zeroes (HR-V5).
    pub keep: bool,
    /// Space for the pieces of a message.
    pub pieces: &'a mut Pieces,
    /// The time that there is.
    pub budget: Budget,
    /// How many bytes of the next message's memory have been given back, which there was no time to end.
    pub done: &'a mut u64,
}

/// What becomes of a buffer.
enum Fate {
    /// It is used, with so many bytes written into it.
    Used(u32),
    /// There is no use for it now.
    Left,
    /// There was no time for all of the message.
    Unfinished,
}

/// A buffer that was taken from the available ring.
struct Taken {
    head: u16,
    /// How many bytes the device has written into it.
    written: u32,
}

impl Answers<'_> {
    /// Takes what has come, asks what there is to ask, and says whether there is more to take.
    pub fn serve(&mut self, vring: &mut VringState, messages: &Counter) -> Next {
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Next::Notified;
        }
        match self.batch(queue, messages) {
            Ok((notify, more)) => {
                if notify {
                    // The front end may be gone, which its socket will tell.
                    let _ = vring.signal_used_queue();
                }
                match more {
                    true => Next::Soon,
                    false => Next::Notified,
                }
            }
            // There is nothing to be taken from a queue whose rings make no sense, until it is set up anew.
            Err(_) => {
                self.counters.refuse(Refusal::BadChain);
                Next::Notified
            }
        }
    }

    /// Returns whether the guest wants to be told of buffers that it got back, and whether there are more.
    fn batch(&mut self, queue: &mut Queue, messages: &Counter) -> Result<(bool, bool), Error> {
        lock(self.requests).start(queue.next_avail(), self.counters);
        queue.disable_notification(self.memory)?;
        let mut taken = Vec::new();
        // So many of them are to be used. Those behind are for requests that there are not.
        let mut needed = 0;
        let mut bytes = Vec::new();
        let budget = self.budget;
        let mut in_time = true;
        for chain in queue.iter(self.memory)?.take(MAX_BATCH) {
            let head = chain.head_index();
            let (written, need) = match self.take(chain, &mut bytes, messages, budget) {
                Ok(Fate::Used(written)) => (written, true),
                Ok(Fate::Left) => (0, false),
                Ok(Fate::Unfinished) => {
                    in_time = false;
                    (0, false)
                }
                Err(reason) => {
                    self.counters.refuse(reason);
                    (0, true)
                }
            };
            taken.push(Taken { head, written });
            if need {
                needed = taken.len();
            }
            // Others wait for this queue and for what it locks.
            if !in_time || budget.is_over() {
                in_time = false;
                break;
            }
        }
        let full = taken.len() == MAX_BATCH;
        if full && needed == 0 {
            // The message that the guest may be waiting for is behind them.
            self.counters.refuse(Refusal::TooManyBuffers);
            needed = taken.len();
        }
        let unneeded = u16::try_from(taken.len() - needed).unwrap_or(u16::MAX);
        for buffer in taken.iter().take(needed) {
            let Taken { head, written } = *buffer;
            complete(queue, self.memory, head, written, self.counters)?;
        }
        // The guest is to tell of what comes behind all that were looked at.
        let more = queue.enable_notification(self.memory)?;
        queue.set_next_avail(queue.next_avail().wrapping_sub(unneeded));
        lock(self.requests).position = Some(queue.next_avail());
        let notify = needed > 0 && wants_notification(queue, self.memory)?;
        Ok((notify, more || !in_time))
    }

    /// Takes a message in, or fills a buffer with a request. Says what becomes of the buffer.
    fn take(
        &mut self,
        chain: Chain<'_>,
        bytes: &mut Vec<u8>,
        messages: &Counter,
        budget: Budget,
    ) -> Result<Fate, Refusal> {
        let (mut readable, mut writable) = (false, 0_u64);
        buffers(chain.clone(), |descriptor| {
            if descriptor.is_write_only() {
                writable += u64::from(descriptor.len());
            } else {
                readable = true;
            }
        })?;
        match (readable, writable) {
            (true, 0) => {
                let done = *self.done;
                let heard = self.hear(chain, bytes, budget);
                if !matches!(heard, Ok(Fate::Unfinished)) {
                    messages.add(1);
                    *self.done = 0;
                } else if *self.done == done {
                    // It is another message than before, and has no such memory.
                    *self.done = 0;
                }
                heard
            }
            (false, room) if room >= REQUEST.into() => self.ask(chain),
            _ => Err(Refusal::Malformed),
        }
    }

    /// Fills a buffer with the next request, if there is one.
    fn ask(&mut self, chain: Chain<'_>) -> Result<Fate, Refusal> {
        let mut requests = lock(self.requests);
        let Some((id, kept)) = requests.waiting() else {
            return Ok(Fate::Left);
        };
        let request = kept.command.encode(id);
        let mut rest = request.as_slice();
        for descriptor in chain {
            let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at(length.min(rest.len()));
            self.memory
                .write_slice(part, descriptor.addr())
                .map_err(|_| Refusal::BadBuffer)?;
            rest = behind;
        }
        kept.status = RequestStatus::Open;
        self.counters.asked.add(1);
        Ok(Fate::Used(REQUEST))
    }

    /// Does what a message of an answer says.
    fn hear(
        &mut self,
        chain: Chain<'_>,
        bytes: &mut Vec<u8>,
        budget: Budget,
    ) -> Result<Fate, Refusal> {
        bytes.clear();
        read(self.memory, chain, page_set::MAX_SIZE, bytes)?;
        let first = *self.done == 0;
        if first {
            self.counters.received_answers.add(bytes.len() as u64);
        }
        let message = Message::parse(bytes).map_err(|error| {
            debug!("a message of an answer is malformed: {error}");
            Refusal::Malformed
        })?;
        match message {
            Message::Completion(completion) => {
                let mut requests = lock(self.requests);
                requests.end(completion.request_id, completion.status, self.counters)?;
                Ok(Fate::Used(0))
            }
            Message::Pages(set) => {
                if first {
                    self.counters.page_set(set.encoding);
                }
                match set.command {
                    page_set::Command::UnusedSkip => self.keep(&set).map(|()| Fate::Used(0)),
                    _ => self.discard(&set, budget),
                }
            }
        }
    }

    /// Keeps which pages may be left out of a copy. Nothing happens to them (HR-V3).
    fn keep(&mut self, set: &PageSet<'_>) -> Result<(), Refusal> {
        let mut requests = lock(self.requests);
        let kept = requests.of(set)?;
        let (mut named, mut outside) = (0_u64, false);
        for range in balloon_pages(set) {
            let added = kept.pages.add(&range);
            named = named.saturating_add(added.new * BALLOON_PAGE_SIZE);
            outside |= added.outside > 0;
        }
        kept.named = kept.named.saturating_add(named);
        self.counters.unused.add(named);
        tell(outside)
    }

    /// Gives pages back to the host, before the guest gets the buffer back that names them (HR-V5).
    fn discard(&mut self, set: &PageSet<'_>, budget: Budget) -> Result<Fate, Refusal> {
        lock(self.requests).of(set)?;
        let (mut named, mut all) = (0_u64, 0_u64);
        for range in balloon_pages(set) {
            let [start, end] =
                [range.start, range.end].map(|page| page.saturating_mul(BALLOON_PAGE_SIZE));
            named = named.saturating_add(self.balloon.whole_granules(&(start..end), self.pieces));
            all = all.saturating_add(end - start);
        }
        if self.keep {
            self.pieces.clear();
        }
        let before = self.counters.discarded.get();
        let in_time = self
            .discarder
            .discard(self.pieces, self.counters, self.done, budget);
        let discarded = self.counters.discarded.get().saturating_sub(before);
        // Nobody but this thread ends a request of a guest that is connected.
        let mut requests = lock(self.requests);
        let kept = requests.of(set)?;
        kept.discarded = kept.discarded.saturating_add(discarded);
        if !in_time {
            return Ok(Fate::Unfinished);
        }
        kept.named = kept.named.saturating_add(named);
        self.counters.unused.add(named);
        tell(named < all)?;
        Ok(Fate::Used(0))
    }
}

/// The pages of a set as ranges of balloon pages. No page is smaller than that, and none ends beyond 2^64 bytes:
/// no bit is shifted out.
fn balloon_pages(set: &PageSet<'_>) -> impl Iterator<Item = Range<u64>> {
    let shift = u32::from(set.page_shift).saturating_sub(VIRTIO_BALLOON_PFN_SHIFT);
    set.ranges()
        .map(move |range| range.start << shift..range.end << shift)
}

/// Refuses pages that are not in the guest's memory, where the others have been dealt with (PS-V7).
fn tell(outside: bool) -> Result<(), Refusal> {
    if outside {
        Err(Refusal::OutsideMemory)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discard::Granularity;
    use crate::testing::{GuestQueue, PAGE};
    use balloon_wire::request::Wanted;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    /// Where the driver has its buffers for requests, and the memory that it names, in bytes.
    const BUFFERS: u64 = 0x10000;
    const NAMED: u64 = 1 << 20;
    /// The first page of that memory.
    const FIRST: u64 = NAMED / PAGE;

    const ALL: Wanted = Wanted {
        block_shift: 12,
        start: 0,
        end: 0,
    };

    /// A driver, and the device's side of its queue.
    struct World {
        guest: GuestQueue,
        balloon: Balloon,
        requests: Mutex<Requests>,
        counters: Counters,
        messages: Counter,
        /// Whether free pages hold something.
        keep: bool,
        budget: Budget,
        done: u64,
        /// How many buffers for requests the driver has made available.
        offered: u64,
    }

    impl World {
        fn new() -> Self {
            let guest = GuestQueue::new();
            guest
                .memory
                .write_slice(&[1; 16 * 4096], GuestAddress(NAMED))
                .unwrap();
            let mut balloon = Balloon::default();
            balloon.set_memory(&guest.memory, Granularity::Bytes(PAGE));
            Self {
                guest,
                balloon,
                requests: Mutex::default(),
                counters: Counters::default(),
                messages: Counter::default(),
                keep: false,
                budget: Budget::UNLIMITED,
                done: 0,
                offered: 0,
            }
        }

        fn serve(&mut self) -> bool {
            let mut answers = Answers {
                memory: &self.guest.memory,
                requests: &self.requests,
                balloon: &self.balloon,
                discarder: &mut Discarder::default(),
                counters: &self.counters,
                keep: self.keep,
                pieces: &mut Pieces::default(),
                budget: self.budget,
                done: &mut self.done,
            };
            answers.serve(&mut self.guest.vring(), &self.messages) != Next::Notified
        }

        /// Makes buffers for requests available, full of what was there before.
        fn offer(&mut self, buffers: u64) {
            for _ in 0..buffers {
                let place = BUFFERS + 64 * self.offered;
                self.guest
                    .memory
                    .write_slice(&[0xa5; 64], GuestAddress(place))
                    .unwrap();
                self.guest.send_writable(&[(place, 40)]);
                self.offered += 1;
            }
        }

        fn begin(&mut self, command: Command) -> u64 {
            let pages = self.balloon.no_pages();
            lock(&self.requests).begin(command, pages).unwrap()
        }

        /// A request that the driver has seen.
        fn asked(&mut self, command: Command) -> u64 {
            let id = self.begin(command);
            self.offer(1);
            self.serve();
            assert_eq!(self.status(id), RequestStatus::Open);
            id
        }

        fn progress(&self, id: u64) -> Progress {
            lock(&self.requests).progress(id).unwrap()
        }

        fn status(&self, id: u64) -> RequestStatus {
            self.progress(id).status
        }

        /// What the driver finds in one of its buffers.
        fn buffer(&self, number: u64) -> Vec<u8> {
            let mut bytes = vec![0; 40];
            self.guest
                .memory
                .read_slice(&mut bytes, GuestAddress(BUFFERS + 64 * number))
                .unwrap();
            bytes
        }

        /// Answers with pages of the memory from [`FIRST`] on.
        fn name(&mut self, command: u32, id: u64, pages: Range<u64>) {
            // Pages of 4 KiB, as ranges, with more to come.
            let first = u64::from(command) | (12 << 16) | (1 << 24) | (1 << 32);
            let count = pages.end - pages.start;
            let words = [first, id, 0, count, ((FIRST + pages.start) << 12) | count];
            self.guest.send(&[&words.map(u64::to_le_bytes).concat()]);
        }

        /// The same, with two ranges.
        fn name_both(&mut self, command: u32, id: u64, pages: [Range<u64>; 2]) {
            let first = u64::from(command) | (12 << 16) | (1 << 24) | (1 << 32);
            let count: u64 = pages.iter().map(|pages| pages.end - pages.start).sum();
            let [one, other] =
                pages.map(|pages| ((FIRST + pages.start) << 12) | (pages.end - pages.start));
            let words = [first, id, 0, count, one, other];
            self.guest.send(&[&words.map(u64::to_le_bytes).concat()]);
        }

        fn complete(&mut self, status: u8, id: u64) {
            let first = [7, 0, status, 0, 0, 0, 0, 0];
            self.guest.send(&[&first, &id.to_le_bytes()]);
        }

        /// The pages that a client can read of.
        fn pages(&self, id: u64) -> Vec<u64> {
            let ranges = lock(&self.requests).ranges(id, 0).unwrap();
            assert_eq!((ranges.id, ranges.end, ranges.next), (id, 16 << 20, None));
            let pages = |(start, bytes): (u64, u64)| start / PAGE..(start + bytes) / PAGE;
            ranges.ranges.into_iter().flat_map(pages).collect()
        }

        /// The first bytes of some of the memory that is named.
        fn contents(&self) -> Vec<u8> {
            (0..5)
                .map(|page| {
                    let place = GuestAddress(NAMED + page * PAGE);
                    self.guest.memory.read_obj(place).unwrap()
                })
                .collect()
        }

        fn malformed(&self) -> u64 {
            self.counters.refused(Refusal::Malformed)
        }
    }

    /// HR-V2
    #[test]
    fn a_request_waits_for_a_buffer_and_fills_it() {
        let mut world = World::new();
        let id = world.begin(Command::DropCaches {
            pages: true,
            slab: true,
        });
        assert!(!world.serve());
        assert_eq!(world.status(id), RequestStatus::Waiting);
        world.offer(2);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Open);
        let request = Command::DropCaches {
            pages: true,
            slab: true,
        }
        .encode(id);
        assert_eq!(world.buffer(0), [&request[..], &[0xa5; 8]].concat());
        assert_eq!(world.buffer(1), [0xa5; 40]);
        assert_eq!((world.guest.used(), world.guest.next_avail()), (1, 1));
        assert_eq!(world.guest.used_element(0), (0, 32));
        // The driver is to tell of what comes behind the buffer that is left.
        assert_eq!(world.guest.avail_event(), 2);
        world.complete(1, id);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Complete);
        assert_eq!(world.messages.get(), 1);
    }

    /// HR-V9
    #[test]
    fn buffers_in_front_of_a_message_come_back_empty() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        world.offer(2);
        world.serve();
        assert_eq!(world.guest.used(), 1);
        world.name(3, id, 0..1);
        world.offer(1);
        world.serve();
        // In the order in which they came, with the last one left.
        assert_eq!((world.guest.used(), world.guest.next_avail()), (4, 4));
        let used = |number| world.guest.used_element(number);
        assert_eq!([1, 2, 3].map(used), [(1, 0), (2, 0), (3, 0)]);
        assert_eq!(world.buffer(1), [0xa5; 40]);
        assert_eq!(world.pages(id), [FIRST]);
    }

    #[test]
    fn a_request_may_be_cut_anywhere() {
        let mut world = World::new();
        let id = world.begin(Command::UnusedSkip(ALL));
        let pieces = [(BUFFERS, 3), (BUFFERS + 64, 0), (BUFFERS + 128, 30)];
        world.guest.send_writable(&pieces);
        world.serve();
        let request = Command::UnusedSkip(ALL).encode(id);
        assert_eq!(world.buffer(0)[..3], request[..3]);
        assert_eq!(world.buffer(2)[..29], request[3..]);
    }

    /// HR-V1, HR-V8
    #[test]
    fn ids_are_never_those_of_open_requests() {
        let mut requests = Requests::after(u64::MAX - 1);
        let mut begin = || requests.begin(Command::UnusedSkip(ALL), PageMap::default());
        assert_eq!(begin(), Ok(u64::MAX));
        assert_eq!(begin(), Ok(1));
        requests.last = u64::MAX - 1;
        let next = requests.begin(Command::UnusedSkip(ALL), PageMap::default());
        assert_eq!(next, Ok(2));
        assert!(
            Requests::default().last > 1 << 40,
            "what another process gave out"
        );
    }

    /// HR-V3
    #[test]
    fn pages_to_skip_are_left_alone() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        world.name(3, id, 0..2);
        world.name(3, id, 4..5);
        world.name(3, id, 1..3);
        // There is no such memory.
        world.name(3, id, 5000..5001);
        world.complete(1, id);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Complete);
        assert_eq!(world.pages(id), [0, 1, 2, 4].map(|page| FIRST + page));
        assert_eq!(world.progress(id).named, 4 * PAGE);
        assert_eq!(world.progress(id).discarded, 0);
        assert_eq!(world.contents(), [1; 5]);
        assert_eq!(world.counters.refused(Refusal::OutsideMemory), 1);
        assert_eq!(world.guest.used(), 6);
    }

    /// HR-V5
    #[test]
    fn pages_to_discard_are_given_back() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedDiscard(ALL));
        world.name(4, id, 1..3);
        world.serve();
        assert_eq!(world.contents(), [1, 0, 0, 1, 1]);
        assert_eq!(world.guest.used(), 2);
        let Progress {
            named, discarded, ..
        } = world.progress(id);
        assert_eq!((named, discarded), (2 * PAGE, 2 * PAGE));
        // What is used by now is the guest's again.
        world
            .guest
            .memory
            .write_slice(&[7; 4096], GuestAddress(NAMED + PAGE))
            .unwrap();
        world.complete(1, id);
        world.serve();
        assert_eq!(world.contents(), [1, 7, 0, 1, 1]);
    }

    #[test]
    fn others_have_their_turn_between_two_messages_that_take_long() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedDiscard(ALL));
        world.name(4, id, 1..2);
        world.name(4, id, 3..4);
        world.budget = Budget::spent();
        assert!(world.serve());
        assert_eq!(world.contents(), [1, 0, 1, 1, 1]);
        assert!(world.serve());
        assert_eq!(world.contents(), [1, 0, 1, 0, 1]);
        assert!(!world.serve());
    }

    #[test]
    fn others_have_their_turn_within_a_message_that_takes_long() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedDiscard(ALL));
        // Two pieces, and two turns.
        world.name_both(4, id, [0..1, 3..4]);
        world.budget = Budget::spent();
        let used = world.guest.used();
        assert!(world.serve());
        assert_eq!(world.contents(), [0, 1, 1, 1, 1]);
        let now = world.progress(id);
        assert_eq!(
            (now.named, now.discarded, world.guest.used()),
            (0, PAGE, used)
        );
        world.serve();
        assert_eq!(world.contents(), [0, 1, 1, 0, 1]);
        let now = world.progress(id);
        assert_eq!((now.named, now.discarded), (2 * PAGE, 2 * PAGE));
        assert_eq!(world.guest.used(), used + 1);
        assert_eq!(world.messages.get(), 1);
        assert_eq!(world.counters.snapshot().encodings.ranges, 1);
    }

    /// HR-V5
    #[test]
    fn poisoned_pages_are_left_alone() {
        let mut world = World::new();
        world.keep = true;
        let id = world.asked(Command::UnusedDiscard(ALL));
        world.name(4, id, 0..3);
        world.serve();
        assert_eq!(world.contents(), [1; 5]);
        let Progress {
            named, discarded, ..
        } = world.progress(id);
        assert_eq!((named, discarded), (3 * PAGE, 0));
    }

    #[test]
    fn parts_of_granules_are_not_given_back() {
        let mut world = World::new();
        world
            .balloon
            .set_memory(&world.guest.memory, Granularity::Bytes(2 * PAGE));
        let id = world.asked(Command::UnusedDiscard(ALL));
        world.name(4, id, 1..4);
        world.serve();
        assert_eq!(world.contents(), [1, 1, 0, 0, 1]);
        assert_eq!(world.progress(id).discarded, 2 * PAGE);
    }

    /// HR-V6
    #[test]
    fn messages_of_no_open_request_are_refused() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedDiscard(ALL));
        let waiting = world.begin(Command::UnusedDiscard(ALL));
        let drop = Command::DropCaches {
            pages: true,
            slab: false,
        };
        world.name(4, id + 7, 0..1);
        world.name(4, waiting, 0..1);
        world.name(3, id, 0..1);
        world.name(1, id, 0..1);
        world.complete(1, id + 7);
        world.complete(1, waiting);
        world.complete(0, id);
        world.guest.send(&[b"short"]);
        world.serve();
        assert_eq!(world.malformed(), 8);
        assert_eq!(world.contents(), [1; 5]);
        assert_eq!(world.status(id), RequestStatus::Open);
        assert_eq!(world.status(waiting), RequestStatus::Waiting);

        world.complete(1, id);
        world.name(4, id, 0..1);
        world.complete(1, id);
        world.serve();
        assert_eq!(world.malformed(), 10);
        assert_eq!(world.contents(), [1; 5]);
        assert_eq!(world.guest.used(), 12);

        let caches = world.begin(drop);
        world.offer(2);
        world.serve();
        world.name(4, caches, 0..1);
        world.serve();
        assert_eq!(world.malformed(), 11);
        assert_eq!(world.contents(), [1; 5]);
    }

    /// PS-V6
    #[test]
    fn what_is_neither_kind_of_buffer_is_refused() {
        let mut world = World::new();
        let id = world.begin(Command::UnusedSkip(ALL));
        world.guest.send_writable(&[(BUFFERS, 31)]);
        world.guest.send_mixed(BUFFERS, 64);
        world.guest.send(&[b""]);
        world.guest.send_writable(&[((16 << 20) - 8, 32)]);
        world.guest.send_loop();
        world.guest.send_outside();
        world.guest.send(&[&vec![0; page_set::MAX_SIZE + 1]]);
        world.serve();
        assert_eq!(world.malformed(), 3);
        for reason in [Refusal::BadChain, Refusal::TooLong] {
            assert_eq!(world.counters.refused(reason), 1, "{reason}");
        }
        assert_eq!(world.counters.refused(Refusal::BadBuffer), 2);
        assert_eq!(world.guest.used(), 7);
        assert!((0..7).all(|number| world.guest.used_element(number).1 == 0));
        assert_eq!(world.status(id), RequestStatus::Waiting);
    }

    #[test]
    fn a_message_is_found_behind_many_buffers() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        world.offer(MAX_BATCH as u64 + 9);
        world.complete(1, id);
        assert!(world.serve(), "there is more");
        assert_eq!(world.counters.refused(Refusal::TooManyBuffers), 1);
        assert!(!world.serve());
        assert_eq!(world.status(id), RequestStatus::Complete);
        assert_eq!(usize::from(world.guest.used()), 1 + MAX_BATCH + 9 + 1);
    }

    /// HR-V7
    #[test]
    fn what_came_before_the_end_holds() {
        for (number, status) in [
            (2, RequestStatus::Aborted),
            (3, RequestStatus::Cancelled),
            (4, RequestStatus::Unsupported),
            (5, RequestStatus::Malformed),
            (6, RequestStatus::UnknownId),
        ] {
            let mut world = World::new();
            let id = world.asked(Command::UnusedSkip(ALL));
            world.name(3, id, 0..2);
            world.complete(number, id);
            world.name(3, id, 3..4);
            world.serve();
            assert_eq!(world.status(id), status);
            assert_eq!(world.pages(id), [FIRST, FIRST + 1]);
            let counters = world.counters.snapshot();
            assert_eq!((counters.asked, counters.unused), (1, 2 * PAGE));
            assert_eq!(counters.answered, [(status, 1)].into());
            // Two page sets and a completion.
            assert_eq!(counters.received.requests, 2 * 40 + 16);
            assert_eq!(counters.encodings.ranges, 2);
        }
    }

    /// HR-V8
    #[test]
    fn no_request_is_open_after_a_reset() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedDiscard(ALL));
        let waiting = world.begin(Command::UnusedSkip(ALL));
        lock(&world.requests).restart();
        world.guest.reset();
        world.name(4, id, 0..2);
        world.complete(1, id);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Reset);
        assert_eq!(world.malformed(), 2);
        assert_eq!(world.contents(), [1; 5]);
        // The driver before it has not seen this one.
        assert_eq!(world.status(waiting), RequestStatus::Waiting);
        world.offer(1);
        world.serve();
        assert_eq!(world.status(waiting), RequestStatus::Open);
        lock(&world.requests).disconnect(&world.counters);
        assert_eq!(world.status(waiting), RequestStatus::Reset);
        let answered = world.counters.snapshot().answered;
        assert_eq!(answered, [(RequestStatus::Reset, 2)].into());
        assert!(world.begin(Command::UnusedSkip(ALL)) > waiting);
    }

    #[test]
    fn a_queue_that_was_stopped_goes_on() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        world.offer(2);
        world.serve();
        lock(&world.requests).restart();
        world.name(3, id, 0..1);
        world.complete(1, id);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Complete);
        // Another process would take the queue up there.
        assert_eq!(world.guest.next_avail(), world.guest.used());
    }

    #[test]
    fn requests_are_answered_side_by_side() {
        let mut world = World::new();
        let skip = world.asked(Command::UnusedSkip(ALL));
        let discard = world.asked(Command::UnusedDiscard(ALL));
        world.name(3, skip, 0..1);
        world.name(4, discard, 1..2);
        world.name(3, skip, 2..3);
        world.complete(1, discard);
        world.complete(1, skip);
        while world.serve() {}
        assert_eq!(world.pages(skip), [FIRST, FIRST + 2]);
        assert!(world.pages(discard).is_empty());
        assert_eq!(world.contents(), [1, 0, 1, 1, 1]);
        assert_eq!(world.malformed(), 0);
        assert_eq!(lock(&world.requests).open(), 0);
    }

    #[test]
    fn a_cancel_is_a_request_of_its_own() {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        for _ in 0..2 {
            lock(&world.requests).cancel(id).unwrap();
        }
        world.offer(2);
        world.serve();
        assert_eq!(world.guest.used(), 2, "one cancel is enough");
        let cancel = id + 1;
        assert_eq!(world.buffer(1)[..32], Command::Cancel { id }.encode(cancel));
        assert_eq!(lock(&world.requests).progress(cancel), None);
        world.name(3, id, 0..1);
        world.complete(3, id);
        world.complete(1, cancel);
        world.serve();
        assert_eq!(world.status(id), RequestStatus::Cancelled);
        assert_eq!(world.pages(id), [FIRST]);
        assert_eq!(lock(&world.requests).open(), 0);

        // Nobody has seen this one.
        let id = world.begin(Command::UnusedSkip(ALL));
        lock(&world.requests).cancel(id).unwrap();
        assert_eq!(world.status(id), RequestStatus::Cancelled);
    }

    #[test]
    fn a_few_requests_are_kept() {
        let mut world = World::new();
        let first = world.asked(Command::UnusedSkip(ALL));
        let others: Vec<_> = (1..MAX_REQUESTS)
            .map(|_| world.begin(Command::UnusedSkip(ALL)))
            .collect();
        let begin = |world: &World| {
            lock(&world.requests).begin(Command::UnusedSkip(ALL), PageMap::default())
        };
        assert_eq!(begin(&world), Err(TooMany));
        // There is room to cancel each of them.
        world.offer(3);
        world.serve();
        for &id in others.iter().chain([&first]) {
            lock(&world.requests).cancel(id).unwrap();
        }
        world.complete(1, first);
        world.serve();
        let next = begin(&world).unwrap();
        assert_eq!(lock(&world.requests).progress(first), None);
        assert!(
            others
                .iter()
                .all(|&id| world.status(id) == RequestStatus::Open)
        );
        assert_eq!(world.status(next), RequestStatus::Waiting);
    }

    #[test]
    fn a_long_answer_is_read_in_parts() {
        let mut map = PageMap::new(std::iter::once(0..4 * MAX_RANGES as u64));
        for page in 0..2 * MAX_RANGES as u64 {
            map.add(&(2 * page..2 * page + 1));
        }
        let mut requests = Requests::default();
        let id = requests.begin(Command::UnusedSkip(ALL), map).unwrap();
        let first = requests.ranges(id, 0).unwrap();
        assert_eq!(first.ranges.len(), MAX_RANGES);
        assert_eq!(first.next, Some(2 * MAX_RANGES as u64 * PAGE));
        let second = requests.ranges(id, first.next.unwrap()).unwrap();
        assert_eq!(second.ranges.len(), MAX_RANGES);
        assert_eq!(second.ranges[0], (first.next.unwrap(), PAGE));
        assert_eq!(second.next, None);
        assert_eq!(requests.ranges(id + 1, 0), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// In whatever order buffers come and requests are made: they are used in order, each request is asked
        /// once, and what is left in the ring is for requests only.
        #[test]
        fn buffers_are_used_in_order(steps in prop::collection::vec(0_u8..6, 0..40)) {
            let mut world = World::new();
            let (mut sent, mut asked, mut open) = (0_u16, 0, Vec::new());
            for step in steps {
                match step {
                    0 if world.offered < 40 => {
                        world.offer(1);
                        sent += 1;
                    }
                    1 if lock(&world.requests).open() < MAX_REQUESTS as u64 => {
                        let caches = Command::DropCaches { pages: true, slab: false };
                        open.push(world.begin(caches));
                        asked += 1;
                    }
                    2 => {
                        if let Some(place) = open
                            .iter()
                            .position(|&id| world.status(id) == RequestStatus::Open)
                        {
                            let id = open.remove(place);
                            world.complete(1, id);
                            sent += 1;
                        }
                    }
                    3 => {
                        world.guest.send(&[b"nonsense"]);
                        sent += 1;
                    }
                    _ => {
                        while world.serve() {}
                    }
                }
            }
            while world.serve() {}
            let used = world.guest.used();
            prop_assert_eq!(world.guest.next_avail(), used);
            prop_assert_eq!(world.guest.avail_event(), sent);
            let written = (0..used).filter(|&n| world.guest.used_element(n).1 == 32).count();
            let waiting = open
                .iter()
                .filter(|&&id| world.status(id) == RequestStatus::Waiting)
                .count();
            prop_assert_eq!(written + waiting, asked);
            // There is either nothing to ask or no buffer for it.
            prop_assert!(waiting == 0 || used == sent);
        }
    }
}
