// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory statistics (specification, clause 5.5.6.3).
//!
//! The guest always has one buffer with statistics on the queue. The device uses it when it wants a new
//! sample, and the guest fills it again. Until then it stays in the available ring and is only looked at:
//! a front end that stops the queue finds it there.

use std::collections::BTreeMap;
use std::time::Instant;

use balloon_control::{Stat, Stats as Answer};
use balloon_wire::stat;
use vhost_user_backend::VringState;
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::counters::{Counter, Counters, Refusal};
use crate::queue::{complete, read, wants_notification};

/// How long a message may be, in bytes: many times what every tag that there is takes.
const MAX_MESSAGE: usize = 4096;

/// What a guest has sent.
#[derive(Clone, Debug)]
struct Sample {
    values: BTreeMap<Stat, u64>,
    at: Instant,
}

/// The last sample, and whether another one is wanted.
#[derive(Debug, Default)]
pub struct Stats {
    sample: Option<Sample>,
    total: Option<(u64, u64)>,
    /// The number of the last sample. 0 is none.
    sequence: u64,
    wanted: bool,
    /// Whether the guest has filled the buffer since the queue began. Before, what is in it may be as old as a pause.
    fresh: bool,
    /// The position in the available ring of the buffer that was looked at.
    seen: Option<u16>,
    bytes: Vec<u8>,
}

impl Stats {
    /// Has the guest send a new sample.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// Takes note that the queue begins again.
    pub fn restart(&mut self) {
        self.seen = None;
        self.fresh = false;
    }

    /// Forgets the last sample, of a guest that is gone.
    pub fn forget(&mut self) {
        self.restart();
        self.sample = None;
        self.total = None;
    }

    /// Forgets how much memory the guest has, and wants a new sample: it may have been given more, or less.
    pub fn forget_total(&mut self) {
        self.total = None;
        self.want();
    }

    /// The number of the last sample. 0 is none.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// How much memory the guest has, in bytes, as the last sample of a balloon at rest has it, and how much was in
    /// the balloon then. The guest's total includes the balloon or does not: that depends on its features.
    pub fn total(&self) -> Option<(u64, u64)> {
        self.total
    }

    /// The last sample.
    pub fn answer(&self) -> Option<Answer> {
        self.sample.as_ref().map(|sample| Answer {
            age: sample.at.elapsed().as_secs(),
            sequence: self.sequence,
            values: sample.values.clone(),
        })
    }

    /// Looks at what is on the queue, and gives it back if another sample is wanted. `size` is the balloon's, in
    /// bytes, if it is at rest: of a balloon on its way the guest's total and the size do not go together.
    pub fn serve(
        &mut self,
        vring: &mut VringState,
        memory: &GuestMemoryMmap,
        counters: &Counters,
        messages: &Counter,
        size: Option<u64>,
    ) {
        match self.look(vring, memory, counters, messages, size) {
            Ok(true) => {
                // The front end may be gone, which its socket will tell.
                let _ = vring.signal_used_queue();
            }
            Ok(false) => {}
            Err(_) => counters.refuse(Refusal::BadChain),
        }
    }

    /// Returns whether the guest wants to be told of a buffer that it got back.
    fn look(
        &mut self,
        vring: &mut VringState,
        memory: &GuestMemoryMmap,
        counters: &Counters,
        messages: &Counter,
        size: Option<u64>,
    ) -> Result<bool, Error> {
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Ok(false);
        }
        let mut used = false;
        // A guest has one buffer on the queue, and may have another one there when that comes back.
        for _ in 0..2 {
            let position = queue.next_avail();
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            if self.fresh && self.seen != Some(position) {
                self.seen = Some(position);
                messages.add(1);
                self.bytes.clear();
                match read(memory, chain, MAX_MESSAGE, &mut self.bytes) {
                    Ok(()) => self.parse(counters, size),
                    Err(reason) => counters.refuse(reason),
                }
            }
            if self.fresh && !self.wanted {
                // The guest is to tell of the buffer after this one.
                queue.enable_notification(memory)?;
                queue.go_to_previous_position();
                break;
            }
            (self.fresh, self.wanted) = (true, false);
            self.seen = None;
            complete(queue, memory, head, 0, counters)?;
            used = true;
        }
        Ok(used && wants_notification(queue, memory)?)
    }

    /// Tags that are not known are passed over, whatever their order (specification, clause 5.5.6.3.2).
    fn parse(&mut self, counters: &Counters, size: Option<u64>) {
        if self.bytes.len() % stat::SIZE != 0 {
            counters.refuse(Refusal::Truncated);
            return;
        }
        let entries = self.bytes.chunks_exact(stat::SIZE);
        let values = entries
            .filter_map(|entry| {
                let tag = entry.get(stat::TAG..)?.first_chunk()?;
                let val = entry.get(stat::VAL..)?.first_chunk()?;
                Some((
                    Stat::from_tag(u16::from_le_bytes(*tag))?,
                    u64::from_le_bytes(*val),
                ))
            })
            .collect::<BTreeMap<_, _>>();
        if let (Some(&total), Some(size)) = (values.get(&Stat::TotalMemory), size) {
            self.total = Some((total, size));
        }
        self.sequence += 1;
        self.sample = Some(Sample {
            values,
            at: Instant::now(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::GuestQueue;
    use vhost_user_backend::VringT;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    fn serve(stats: &mut Stats, guest: &GuestQueue) -> Counters {
        serve_with(stats, guest, Some(1 << 20))
    }

    fn serve_with(stats: &mut Stats, guest: &GuestQueue, size: Option<u64>) -> Counters {
        let counters = Counters::default();
        stats.serve(
            &mut guest.vring(),
            &guest.memory,
            &counters,
            &Counter::default(),
            size,
        );
        counters
    }

    /// As it is when the guest has filled a buffer for it.
    fn at_work() -> Stats {
        Stats {
            fresh: true,
            ..Stats::default()
        }
    }

    #[test]
    fn an_old_sample_is_not_taken_for_a_new_one() {
        let mut guest = GuestQueue::new();
        let mut stats = Stats::default();
        // Another process has asked for it, or it is of a new driver.
        guest.send(&[&entry(5, 1 << 30)]);
        serve_with(&mut stats, &guest, Some(0));
        assert_eq!((stats.sequence(), guest.used()), (0, 1));
        guest.send(&[&entry(5, 1 << 30)]);
        serve_with(&mut stats, &guest, Some(0));
        assert_eq!((stats.sequence(), guest.used()), (1, 1));

        // The guest was paused, and its balloon has grown.
        stats.restart();
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (1, 2));
        assert_eq!(stats.total(), Some((1 << 30, 0)));
        guest.send(&[&entry(5, 1 << 29)]);
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (2, 2));
        assert_eq!(stats.total(), Some((1 << 29, 1 << 20)));
    }

    #[test]
    fn the_buffer_stays_until_another_sample_is_wanted() {
        let mut guest = GuestQueue::new();
        let mut stats = at_work();
        guest.send(&[&entry(5, 1 << 30), &entry(0xfffe, 1), &entry(4, 1 << 20)]);
        serve(&mut stats, &guest);
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (1, 0));
        // A front end that stops the queue now finds the buffer where it was.
        assert_eq!(guest.vrings()[0].queue_next_avail(), 0);
        assert_eq!(guest.avail_event(), 1);
        assert_eq!(
            stats.answer().unwrap().values,
            BTreeMap::from([(Stat::FreeMemory, 1 << 20), (Stat::TotalMemory, 1 << 30)])
        );

        assert_eq!(stats.total(), Some((1 << 30, 1 << 20)));

        stats.want();
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (1, 1));
        guest.send(&[&entry(4, 7)]);
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (2, 1));
        assert_eq!(stats.answer().unwrap().values[&Stat::FreeMemory], 7);
        stats.forget();
        assert!(stats.answer().is_none());
        assert_eq!(stats.sequence(), 2, "the next one is newer");
    }

    #[test]
    fn the_total_is_that_of_a_balloon_at_rest() {
        let mut guest = GuestQueue::new();
        let mut stats = at_work();
        guest.send(&[&entry(5, 1 << 30)]);
        serve(&mut stats, &guest);
        assert_eq!(stats.total(), Some((1 << 30, 1 << 20)));
        // Half of it is on its way into the balloon, whose size is not known yet.
        stats.want();
        serve(&mut stats, &guest);
        guest.send(&[&entry(5, 1 << 29)]);
        serve_with(&mut stats, &guest, None);
        assert_eq!(stats.sequence(), 2);
        assert_eq!(stats.total(), Some((1 << 30, 1 << 20)));
        // The guest has been given more memory.
        stats.forget_total();
        assert_eq!(stats.total(), None);
        serve(&mut stats, &guest);
        guest.send(&[&entry(5, 1 << 31)]);
        serve(&mut stats, &guest);
        assert_eq!(stats.total(), Some((1 << 31, 1 << 20)));
    }

    #[test]
    fn a_wish_is_kept_until_there_is_a_buffer() {
        let mut guest = GuestQueue::new();
        let mut stats = at_work();
        stats.want();
        serve(&mut stats, &guest);
        guest.send(&[&entry(4, 7)]);
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (1, 1));
        // The guest is to tell of the buffer that it fills again.
        assert_eq!(guest.avail_event(), 1);
    }

    #[test]
    fn half_an_entry_is_refused() {
        let mut guest = GuestQueue::new();
        let mut stats = at_work();
        guest.send(&[&entry(4, 7)[..9]]);
        let counters = serve(&mut stats, &guest);
        assert_eq!(counters.refused(Refusal::Truncated), 1);
        assert_eq!(stats.sequence(), 0);
        stats.want();
        serve(&mut stats, &guest);
        assert_eq!(guest.used(), 1);
    }
}
