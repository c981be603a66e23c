// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtqueues: which one is which, and taking messages from one.
//!
//! Whatever a guest writes into a queue, its device goes on: what makes no sense is counted, completed and
//! passed over.

use std::sync::atomic::Ordering::Relaxed;

use balloon_wire::{
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_HOST_REQUESTS, VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
};
use vhost_user_backend::VringState;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::counters::{Counters, Refusal};

/// How many queues a balloon can have.
pub const MAX_QUEUES: usize = 6;

/// How many descriptors a queue can have.
pub const MAX_QUEUE_SIZE: usize = 1024;

/// How many messages are taken from a queue before the others get their turn.
pub const MAX_BATCH: usize = 256;

/// What a queue is for, in the order of the specification (clause 5.5.2) and of its extension behind them
/// (docs/protocol.md, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages that go into the balloon.
    Inflate,
    /// Pages that come out of the balloon.
    Deflate,
    /// The guest's memory statistics.
    Stats,
    /// Free page hinting.
    Hinting,
    /// Free page reporting.
    Reporting,
    /// Host requests.
    Requests,
}

impl Kind {
    /// Every queue that there can be.
    pub const ALL: [Self; MAX_QUEUES] = [
        Self::Inflate,
        Self::Deflate,
        Self::Stats,
        Self::Hinting,
        Self::Reporting,
        Self::Requests,
    ];

    /// What the queue with this number is for. The specification has fixed numbers, but Linux, QEMU and
    /// others number the queues that are there one after the other, so that is what a device must do.
    pub fn of(number: usize, acked_features: u64) -> Option<Self> {
        Self::present(acked_features).nth(number)
    }

    /// The number of the queue.
    pub fn number(self, acked_features: u64) -> Option<usize> {
        Self::present(acked_features).position(|kind| kind == self)
    }

    fn present(acked_features: u64) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |kind| {
            let bit = match kind {
                Self::Inflate | Self::Deflate => return true,
                Self::Stats => VIRTIO_BALLOON_F_STATS_VQ,
                Self::Hinting => VIRTIO_BALLOON_F_FREE_PAGE_HINT,
                Self::Reporting => VIRTIO_BALLOON_F_REPORTING,
                Self::Requests => VIRTIO_BALLOON_F_HOST_REQUESTS,
            };
            acked_features & (1 << bit) != 0
        })
    }
}

/// A message of the guest.
pub type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// What is done with the messages of a queue.
pub trait Receiver {
    /// Takes a message in, and says whether there is room for another one.
    fn take(&mut self, chain: Chain<'_>) -> bool;

    /// Does what the messages say that were taken in. The guest gets their buffers back afterwards.
    fn finish(&mut self);
}

/// Takes a number of messages from the queue of a guest, and says whether there are more.
pub fn serve(
    vring: &mut VringState,
    memory: &GuestMemoryMmap,
    heads: &mut Vec<u16>,
    counters: &Counters,
    messages: &crate::counters::Counter,
    receiver: &mut impl Receiver,
) -> bool {
    let queue = vring.get_queue_mut();
    if !queue.ready() {
        return false;
    }
    let served = batch(queue, memory, heads, counters, receiver);
    messages.add(heads.len() as u64);
    match served {
        Ok(Served { notify, more }) => {
            if notify {
                // The front end may be gone, which its socket will tell.
                let _ = vring.signal_used_queue();
            }
            more || wants_more(vring.get_queue_mut(), memory, counters)
        }
        // There is nothing to be taken from a queue whose rings make no sense, until it is set up anew.
        Err(_) => {
            counters.refuse(Refusal::BadChain);
            false
        }
    }
}

struct Served {
    notify: bool,
    more: bool,
}

fn batch(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    heads: &mut Vec<u16>,
    counters: &Counters,
    receiver: &mut impl Receiver,
) -> Result<Served, virtio_queue::Error> {
    heads.clear();
    queue.disable_notification(memory)?;
    let mut more = false;
    for chain in queue.iter(memory)? {
        heads.push(chain.head_index());
        if !receiver.take(chain) || heads.len() == MAX_BATCH {
            more = true;
            break;
        }
    }
    if heads.is_empty() {
        return Ok(Served {
            notify: false,
            more,
        });
    }
    receiver.finish();
    for &head in &*heads {
        complete(queue, memory, head, 0, counters)?;
    }
    Ok(Served {
        notify: wants_notification(queue, memory)?,
        more,
    })
}

/// Gives a buffer back to the guest, with so many bytes written into it.
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

/// Whether the guest wants to be told of the buffers that it got back.
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

/// Has the guest tell of further messages, and says whether there are some already.
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
/// The chain ends too early: it has a loop, or goes on outside of its table.
pub fn buffers(chain: Chain<'_>, mut each: impl FnMut(Descriptor)) -> Result<(), Refusal> {
    let mut complete = false;
    for descriptor in chain {
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

    const STATS: u64 = 1 << VIRTIO_BALLOON_F_STATS_VQ;
    const HINTING: u64 = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT;
    const REPORTING: u64 = 1 << VIRTIO_BALLOON_F_REPORTING;
    const REQUESTS: u64 = 1 << VIRTIO_BALLOON_F_HOST_REQUESTS;

    /// Keeps what it takes.
    #[derive(Default)]
    struct Recorder {
        memory: GuestMemoryMmap,
        limit: usize,
        bytes: Vec<u8>,
        errors: Vec<Refusal>,
        finished: usize,
    }

    impl Receiver for Recorder {
        fn take(&mut self, chain: Chain<'_>) -> bool {
            let result = read(&self.memory, chain, self.limit, &mut self.bytes);
            self.errors.extend(result.err());
            true
        }

        fn finish(&mut self) {
            self.finished += 1;
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
        guest.serve(&Counters::default(), recorder)
    }

    #[test]
    fn queues_are_numbered_densely() {
        assert_eq!(Kind::of(2, STATS | HINTING | REPORTING), Some(Kind::Stats));
        assert_eq!(
            Kind::of(4, STATS | HINTING | REPORTING),
            Some(Kind::Reporting)
        );
        assert_eq!(Kind::of(3, STATS | REPORTING), Some(Kind::Reporting));
        assert_eq!(Kind::of(2, REPORTING), Some(Kind::Reporting));
        assert_eq!(Kind::of(2, 0), None);
        assert_eq!(Kind::Reporting.number(REPORTING), Some(2));
        assert_eq!(Kind::Stats.number(REPORTING), None);
        // The last of those that are there (HR-D1).
        for (others, number) in [
            (0, 2),
            (STATS, 3),
            (STATS | REPORTING, 4),
            (STATS | HINTING | REPORTING, 5),
        ] {
            assert_eq!(Kind::Requests.number(others | REQUESTS), Some(number));
            assert_eq!(Kind::of(number, others), None);
        }
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
