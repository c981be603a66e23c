// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtqueues: taking messages from one.
//!
//! Whatever a guest writes into a queue, its device continues: it counts, completes and skips invalid
//! messages.

use std::sync::atomic::Ordering::Relaxed;

use vhost_user_backend::VringState;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::budget::Budget;
use crate::counters::{Counter, Counters, Refusal};

/// How many descriptors a queue can have.
pub const MAX_QUEUE_SIZE: usize = 1024;

/// How many messages are taken from a queue before the others get their turn.
pub const MAX_BATCH: usize = 256;

/// A message of the guest.
pub type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// A receiver's progress with its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All is done, and the device uses the buffers.
    Done,
    /// The time ran out.
    More,
    /// The host lacks memory for the rest now.
    Blocked,
}

/// An unfinished batch. Its messages are still in the available ring, and are read again. So a front end that
/// stops the queue, or another worker, finds them there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// How many messages it has. 0 if there is none.
    pub messages: usize,
    /// The completed part, in the receiver's unit.
    pub done: u64,
}

impl Unfinished {
    /// Whether there is one.
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

/// Handles the messages of a queue.
pub trait Receiver {
    /// Adds a message, and returns whether there is room for another one. `again` is set if the message was
    /// added before, and the batch not finished.
    fn take(&mut self, chain: Chain<'_>, again: bool) -> bool;

    /// Executes the added messages, from `done` on, as far as time allows. The device uses their buffers when all
    /// is done.
    fn finish(&mut self, done: &mut u64, budget: Budget) -> Progress;
}

/// When to serve a queue again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// When the guest notifies the device.
    Notified,
    /// After the turn of the other queues.
    Soon,
    /// When the host may have memory.
    Later,
}

/// Handles a number of messages from the queue of a guest, and returns when to serve the queue
/// again.
pub fn serve(
    vring: &mut VringState,
    memory: &GuestMemoryMmap,
    heads: &mut Vec<u16>,
    unfinished: &mut Unfinished,
    counters: &Counters,
    messages: &Counter,
    receiver: &mut impl Receiver,
) -> Next {
    let queue = vring.get_queue_mut();
    if !queue.ready() {
        return Next::Notified;
    }
    let served = batch(queue, memory, heads, unfinished, counters, receiver);
    if unfinished.messages == 0 {
        messages.add(heads.len() as u64);
    }
    match served {
        Ok(Served { notify, next }) => {
            if notify {
                // The front end may be gone, which its socket reports later.
                let _ = vring.signal_used_queue();
            }
            match next {
                Next::Notified if wants_more(vring.get_queue_mut(), memory, counters) => Next::Soon,
                next => next,
            }
        }
        // A queue with invalid rings has no messages until it is set up again.
        Err(_) => {
            counters.refuse(Refusal::BadChain);
            Next::Notified
        }
    }
}

struct Served {
    notify: bool,
    next: Next,
}

fn batch(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    heads: &mut Vec<u16>,
    unfinished: &mut Unfinished,
    counters: &Counters,
    receiver: &mut impl Receiver,
) -> Result<Served, virtio_queue::Error> {
    heads.clear();
    queue.disable_notification(memory)?;
    let Unfinished { messages, mut done } = std::mem::take(unfinished);
    let again = messages > 0;
    let limit = if again { messages } else { MAX_BATCH };
    let first = queue.next_avail();
    let mut next = Next::Notified;
    for chain in queue.iter(memory)? {
        heads.push(chain.head_index());
        let room = receiver.take(chain, again);
        if heads.len() == limit || !(room || again) {
            next = Next::Soon;
            break;
        }
    }
    let progress = match heads.is_empty() {
        true => Progress::Done,
        false => receiver.finish(&mut done, Budget::turn()),
    };
    if progress != Progress::Done {
        queue.set_next_avail(first);
        let messages = heads.len();
        *unfinished = Unfinished { messages, done };
        return Ok(Served {
            notify: false,
            next: match progress {
                Progress::Blocked => Next::Later,
                _ => Next::Soon,
            },
        });
    }
    for &head in &*heads {
        complete(queue, memory, head, 0, counters)?;
    }
    Ok(Served {
        notify: !heads.is_empty() && wants_notification(queue, memory)?,
        next,
    })
}

/// Uses a buffer, with so many bytes written into it.
pub fn complete(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    written: u32,
    counters: &Counters,
) -> Result<(), virtio_queue::Error> {
    if head >= queue.size() {
        // There is no such buffer.
        counters.refuse(Refusal::BadChain);
        return Ok(());
    }
    queue.add_used(memory, head, written)
}

/// Whether the guest requires an interrupt for the used buffers.
pub fn wants_notification(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
) -> Result<bool, virtio_queue::Error> {
    let wants = queue.needs_notification(memory)?;
    if queue.event_idx_enabled() {
        return Ok(wants);
    }
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Enables the guest's notifications, and returns whether there are already more messages.
fn wants_more(queue: &mut Queue, memory: &GuestMemoryMmap, counters: &Counters) -> bool {
    queue
        .enable_notification(memory)
        .inspect_err(|_| counters.refuse(Refusal::BadChain))
        .unwrap_or(false)
}

/// Calls `each` for the buffers of a message.
///
/// # Errors
///
/// The chain ends too early: it has a loop, or continues outside of its table. Or it is longer than a queue: the
/// library reads indirect tables, too, which were not negotiated, and bounds them by their own length.
pub fn buffers(chain: Chain<'_>, mut each: impl FnMut(Descriptor)) -> Result<(), Refusal> {
    let mut complete = false;
    for descriptor in chain.take(MAX_QUEUE_SIZE) {
        complete = !descriptor.has_next();
        each(descriptor);
    }
    if complete {
        Ok(())
    } else {
        Err(Refusal::BadChain)
    }
}

/// Appends what the guest has written into the buffers of a message, however they are cut, to `bytes`.
///
/// # Errors
///
/// The chain is broken, not in the guest's memory, or has more than `limit` bytes. `bytes` is as before.
pub fn read(
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    limit: usize,
    bytes: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let before = bytes.len();
    let mut result = Ok(());
    let whole = buffers(chain, |descriptor| {
        if descriptor.is_write_only() || result.is_err() {
            return;
        }
        let start = bytes.len();
        let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        if length > limit.saturating_sub(start - before) {
            result = Err(Refusal::TooLong);
            return;
        }
        bytes.resize(start + length, 0);
        let filled = bytes
            .get_mut(start..)
            .is_some_and(|buffer| memory.read_slice(buffer, descriptor.addr()).is_ok());
        if !filled {
            result = Err(Refusal::BadBuffer);
        }
    });
    let result = result.and(whole);
    if result.is_err() {
        bytes.truncate(before);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::GuestQueue;

    /// Stores the messages that it takes.
    #[derive(Default)]
    struct Recorder {
        memory: GuestMemoryMmap,
        limit: usize,
        bytes: Vec<u8>,
        errors: Vec<Refusal>,
        finished: usize,
        /// The arguments of its calls.
        done: Vec<u64>,
        /// Its results, in reverse order.
        progress: Vec<Progress>,
    }

    impl Receiver for Recorder {
        fn take(&mut self, chain: Chain<'_>, _again: bool) -> bool {
            let result = read(&self.memory, chain, self.limit, &mut self.bytes);
            self.errors.extend(result.err());
            true
        }

        fn finish(&mut self, done: &mut u64, _budget: Budget) -> Progress {
            self.finished += 1;
            self.done.push(*done);
            *done += 1;
            self.progress.pop().unwrap_or(Progress::Done)
        }
    }

    fn recorder(guest: &GuestQueue) -> Recorder {
        Recorder {
            memory: guest.memory.clone(),
            limit: 64,
            ..Recorder::default()
        }
    }

    fn run(guest: &GuestQueue, recorder: &mut Recorder) -> bool {
        guest.serve(&Counters::default(), recorder) != Next::Notified
    }

    #[test]
    fn an_unfinished_batch_stays_in_the_ring() {
        let mut guest = GuestQueue::new();
        guest.send(&[b"one"]);
        guest.send(&[b"two"]);
        let mut recorder = recorder(&guest);
        recorder.progress = vec![Progress::Blocked, Progress::More];
        let mut unfinished = Unfinished::default();
        let counters = Counters::default();
        let mut serve = |guest: &GuestQueue, recorder: &mut Recorder| {
            guest.serve_on(&counters, &mut unfinished, recorder)
        };
        assert_eq!(serve(&guest, &mut recorder), Next::Soon);
        assert_eq!((guest.used(), guest.next_avail()), (0, 0));
        // Messages that arrive meanwhile belong to the next batch.
        guest.send(&[b"three"]);
        assert_eq!(serve(&guest, &mut recorder), Next::Later);
        assert_eq!((guest.used(), guest.next_avail()), (0, 0));
        assert_eq!(serve(&guest, &mut recorder), Next::Soon);
        assert_eq!((guest.used(), guest.next_avail()), (2, 2));
        assert_eq!(serve(&guest, &mut recorder), Next::Notified);
        assert_eq!(guest.used(), 3);
        assert_eq!(recorder.done, [0, 1, 2, 0]);
        assert_eq!(recorder.bytes, b"onetwoonetwoonetwothree");
    }

    #[test]
    fn a_chain_is_no_longer_than_a_queue() {
        let mut guest = GuestQueue::new();
        guest.send_indirect(2000);
        let mut recorder = recorder(&guest);
        assert!(!run(&guest, &mut recorder));
        assert_eq!(recorder.errors, [Refusal::BadChain]);
        assert_eq!(guest.used(), 1);
    }

    #[test]
    fn a_message_may_be_cut_anywhere() {
        let mut guest = GuestQueue::new();
        guest.send(&[b"ab", b"", b"c", b"defg"]);
        let mut recorder = recorder(&guest);
        assert!(!run(&guest, &mut recorder));
        assert_eq!(recorder.bytes, b"abcdefg");
        assert_eq!((recorder.finished, guest.used()), (1, 1));
    }

    #[test]
    fn broken_messages_are_completed() {
        let mut guest = GuestQueue::new();
        guest.send(&[&[1; 65]]);
        guest.send_loop();
        guest.send_outside();
        guest.send(&[b"good"]);
        let mut recorder = recorder(&guest);
        assert!(!run(&guest, &mut recorder));
        assert_eq!(
            recorder.errors,
            [Refusal::TooLong, Refusal::BadChain, Refusal::BadBuffer]
        );
        assert_eq!(recorder.bytes, b"good");
        assert_eq!(guest.used(), 4);
    }

    #[test]
    fn a_head_that_is_none_is_passed_over() {
        let mut guest = GuestQueue::new();
        guest.send_head(u16::MAX);
        guest.send(&[b"good"]);
        let mut recorder = recorder(&guest);
        run(&guest, &mut recorder);
        assert_eq!(recorder.bytes, b"good");
        assert_eq!(guest.used(), 1);
    }

    #[test]
    fn an_impossible_index_ends_the_batch() {
        let mut guest = GuestQueue::new();
        guest.send(&[b"good"]);
        guest.set_avail_index(30000);
        let mut recorder = recorder(&guest);
        assert!(!run(&guest, &mut recorder));
        assert_eq!((recorder.finished, guest.used()), (0, 0));
    }

    #[test]
    fn the_guest_is_asked_to_tell_of_the_next_message() {
        let mut guest = GuestQueue::new();
        guest.send(&[b"one"]);
        guest.send(&[b"two"]);
        let mut recorder = recorder(&guest);
        run(&guest, &mut recorder);
        assert_eq!(guest.avail_event(), 2);
    }
}
