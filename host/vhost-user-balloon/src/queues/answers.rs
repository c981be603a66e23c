// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queue of host requests: the device asks, the guest's driver answers (docs/protocol.md, section 5).
//!
//! The device uses buffers in the order in which they were made available. A buffer for a request stays in the
//! available ring until there is a request: the device only peeks at it. If a message of an answer follows
//! such a buffer, the device uses the buffer without a request, and the driver makes it available again
//! (HR-V9). So the index of the used ring gives the position in the queue, for a front end that stops the
//! queue and for another worker. Nothing of the guest gets lost meanwhile.

use std::ops::Range;

use balloon_control::RequestStatus;
use balloon_wire::page_set::{self, PageSet};
use balloon_wire::request::{self, Message};
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_PFN_SHIFT};
use log::debug;
use vhost_user_backend::VringState;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::requests::Requests;
use super::virtqueue::{Chain, MAX_BATCH, Next, buffers, complete, read, wants_notification};
use crate::budget::Budget;
use crate::counters::{Counter, Counters, Refusal};
use crate::memory::balloon::Balloon;
use crate::memory::discard::{Discarder, Pieces};
use crate::sync::{Mutex, lock};

/// The size of a request in bytes.
const REQUEST: u32 = 32;
const _: () = assert!(request::SIZE == 32);

/// The device's side of the queue.
#[derive(Debug)]
pub struct Answers<'a> {
    /// The guest's memory, which contains the messages.
    pub memory: &'a GuestMemoryMmap,
    /// The requests. Not locked while memory is discarded, which takes long.
    pub requests: &'a Mutex<Requests>,
    /// The guest's memory.
    pub balloon: &'a Balloon,
    /// Returns memory to the host.
    pub discarder: &'a mut Discarder,
    /// The counters.
    pub counters: &'a Counters,
    /// Whether the guest relies on the content of its free pages. Then the device does not discard
    /// them, since a hole reads as zeroes (HR-V5).
    pub keep: bool,
    /// Space for the pieces of a message.
    pub pieces: &'a mut Pieces,
    /// The time limit.
    pub budget: Budget,
    /// How many bytes of the next message's memory were already discarded, if its time ran out.
    pub done: &'a mut u64,
}

/// What to do with a buffer.
enum Fate {
    /// It is used, with so many bytes written into it.
    Used(u32),
    /// It stays available.
    Left,
    /// The time ran out before the message was complete.
    Unfinished,
}

/// A buffer that was taken from the available ring.
struct Taken {
    head: u16,
    /// How many bytes the device has written into it.
    written: u32,
}

impl Answers<'_> {
    /// Handles the guest's messages, sends requests, and returns whether there are more messages.
    pub fn serve(&mut self, vring: &mut VringState, messages: &Counter) -> Next {
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Next::Notified;
        }
        match self.batch(queue, messages) {
            Ok((notify, more)) => {
                if notify {
                    // The front end may be gone, which its socket reports later.
                    let _ = vring.signal_used_queue();
                }
                match more {
                    true => Next::Soon,
                    false => Next::Notified,
                }
            }
            // A queue with invalid rings has no messages until it is set up again.
            Err(_) => {
                self.counters.refuse(Refusal::BadChain);
                Next::Notified
            }
        }
    }

    /// Returns whether the guest wants a notification of used buffers, and whether there are more.
    fn batch(&mut self, queue: &mut Queue, messages: &Counter) -> Result<(bool, bool), Error> {
        lock(self.requests).start(queue.next_avail(), self.counters);
        queue.disable_notification(self.memory)?;
        let mut taken = Vec::new();
        // So many of them to use. The following ones are for future requests.
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
            // Other threads wait for this queue and for its locks.
            if !in_time || budget.is_over() {
                in_time = false;
                break;
            }
        }
        let full = taken.len() == MAX_BATCH;
        if full && needed == 0 {
            // The guest may be waiting for a message that follows them.
            self.counters.refuse(Refusal::TooManyBuffers);
            needed = taken.len();
        }
        let unneeded = u16::try_from(taken.len() - needed).unwrap_or(u16::MAX);
        for buffer in taken.iter().take(needed) {
            let Taken { head, written } = *buffer;
            complete(queue, self.memory, head, written, self.counters)?;
        }
        // The guest must notify the device of buffers after those that were peeked at.
        let more = queue.enable_notification(self.memory)?;
        queue.set_next_avail(queue.next_avail().wrapping_sub(unneeded));
        lock(self.requests).position = Some(queue.next_avail());
        let notify = needed > 0 && wants_notification(queue, self.memory)?;
        Ok((notify, more || !in_time))
    }

    /// Handles a message, or fills a buffer with a request. Returns what to do with the buffer.
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
                    // It is another message than before, without this memory.
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

    /// Handles a message of an answer.
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

    /// Records which pages a copy may leave out. The device does not change them (HR-V3).
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

    /// Returns pages to the host, before it uses the buffer that lists them (HR-V5).
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
        // Only this thread ends a request of a guest that is connected.
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

/// Counts pages outside of the guest's memory as refused. The others were handled (PS-V7).
fn tell(outside: bool) -> Result<(), Refusal> {
    if outside {
        Err(Refusal::OutsideMemory)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
