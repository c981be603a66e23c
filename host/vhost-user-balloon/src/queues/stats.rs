// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory statistics (specification, clause 5.5.6.3).
//!
//! The guest always has one buffer with statistics on the queue. The device uses it to request a new
//! sample, and the guest fills it again. Until then it stays in the available ring, and the device only
//! peeks at it: a front end that stops the queue finds it there.
//!
//! With pressure notices (docs/protocol.md, section 6) the guest adds another one when it is short of memory. The
//! device then uses the older one, and only the newest stays.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Acquire;
use std::time::Instant;

use balloon_control::{Stat, Stats as Answer};
use balloon_wire::stat;
use vhost_user_backend::VringState;
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::virtqueue::{complete, read, wants_notification};
use crate::counters::{Counter, Counters, Refusal};

/// The longest message in bytes: many times the size of all known tags.
const MAX_MESSAGE: usize = 4096;

/// How often the device looks for a buffer. A guest has one on the queue, or two with notices, and may add others while the
/// device looks.
const LOOKS: usize = 6;

/// The statistics of a guest.
#[derive(Clone, Debug)]
struct Sample {
    values: BTreeMap<Stat, u64>,
    at: Instant,
    /// When the device requested it.
    requested: Instant,
}

/// The last sample, and whether another one is requested.
#[derive(Debug, Default)]
pub struct Stats {
    sample: Option<Sample>,
    total: Option<(u64, u64)>,
    /// The number of the last sample. 0 is none.
    sequence: u64,
    /// The number of the last pressure notice.
    notices: u64,
    wanted: bool,
    /// Whether the guest has filled the buffer since the queue was started. Before that, its
    /// content may be as old as a pause.
    fresh: bool,
    /// When the device requested a sample, until the guest sends it.
    requested: Option<Instant>,
    /// The position of the known buffer in the available ring.
    seen: Option<u16>,
    bytes: Vec<u8>,
}

impl Stats {
    /// Requests a new sample.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// Records that the queue has been started again.
    pub fn restart(&mut self) {
        self.seen = None;
        self.fresh = false;
    }

    /// Discards the last sample of a guest that is gone.
    pub fn forget(&mut self) {
        self.restart();
        self.sample = None;
        self.total = None;
    }

    /// Discards the size of the guest's memory, which may have changed, and requests a new sample.
    pub fn forget_total(&mut self) {
        self.total = None;
        self.want();
    }

    /// The number of the last sample. 0 is none.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// How many pressure notices the guest has sent.
    pub fn notices(&self) -> u64 {
        self.notices
    }

    /// The guest's memory in bytes, from the last sample with a balloon at rest, and the balloon's size then.
    /// Whether the guest's total includes the balloon depends on its features.
    pub fn total(&self) -> Option<(u64, u64)> {
        self.total
    }

    /// The last sample.
    pub fn answer(&self) -> Option<Answer> {
        self.sample.as_ref().map(|sample| Answer {
            age: sample.at.elapsed().as_secs(),
            requested: u64::try_from(sample.requested.elapsed().as_millis()).unwrap_or(u64::MAX),
            sequence: self.sequence,
            values: sample.values.clone(),
        })
    }

    /// Reads the buffer on the queue, and uses it if another sample is requested, or if there is a newer one of a guest
    /// with pressure `notices`. `size` is the balloon's size in bytes, if it is at rest: while it changes, the guest's
    /// total and the size do not match.
    pub fn serve(
        &mut self,
        vring: &mut VringState,
        memory: &GuestMemoryMmap,
        counters: &Counters,
        messages: &Counter,
        size: Option<u64>,
        notices: bool,
    ) {
        match self.look(vring, memory, counters, messages, size, notices) {
            Ok(true) => {
                // The front end may be gone, which its socket reports later.
                let _ = vring.signal_used_queue();
            }
            Ok(false) => {}
            Err(_) => counters.refuse(Refusal::BadChain),
        }
    }

    /// Returns whether the guest requires an interrupt for a used buffer.
    fn look(
        &mut self,
        vring: &mut VringState,
        memory: &GuestMemoryMmap,
        counters: &Counters,
        messages: &Counter,
        size: Option<u64>,
        notices: bool,
    ) -> Result<bool, Error> {
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Ok(false);
        }
        let mut used = false;
        for _ in 0..LOOKS {
            let position = queue.next_avail();
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let is_last = !notices || queue.avail_idx(memory, Acquire)?.0 == queue.next_avail();
            if self.fresh && self.seen != Some(position) {
                self.seen = Some(position);
                messages.add(1);
                self.bytes.clear();
                match read(memory, chain, MAX_MESSAGE, &mut self.bytes) {
                    Ok(()) => self.parse(counters, size),
                    Err(reason) => counters.refuse(reason),
                }
            }
            if self.fresh && !self.wanted && is_last {
                // The guest must notify the device of the next buffer, which may be there already.
                let is_more = queue.enable_notification(memory)?;
                queue.go_to_previous_position();
                if is_more && notices {
                    continue;
                }
                break;
            }
            self.seen = None;
            // The guest has added another buffer before the device has used this one. Old ones after a start are no notice.
            self.notices += u64::from(self.fresh && !is_last);
            if is_last {
                (self.fresh, self.wanted) = (true, false);
                self.requested = Some(Instant::now());
            }
            complete(queue, memory, head, 0, counters)?;
            used = true;
        }
        Ok(used && wants_notification(queue, memory)?)
    }

    /// Unknown tags are ignored, in any order (specification, clause 5.5.6.3.2).
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
        let at = Instant::now();
        self.sample = Some(Sample {
            values,
            at,
            requested: self.requested.take().unwrap_or(at),
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
            true,
        );
        counters
    }

    /// The state after the guest has filled a buffer for it.
    fn at_work() -> Stats {
        Stats {
            fresh: true,
            ..Stats::default()
        }
    }

    #[test]
    fn each_tag_of_the_header_is_a_statistic() {
        use balloon_wire::*;
        let tag = |stat: Stat| match stat {
            Stat::SwapIn => VIRTIO_BALLOON_S_SWAP_IN,
            Stat::SwapOut => VIRTIO_BALLOON_S_SWAP_OUT,
            Stat::MajorFaults => VIRTIO_BALLOON_S_MAJFLT,
            Stat::MinorFaults => VIRTIO_BALLOON_S_MINFLT,
            Stat::FreeMemory => VIRTIO_BALLOON_S_MEMFREE,
            Stat::TotalMemory => VIRTIO_BALLOON_S_MEMTOT,
            Stat::AvailableMemory => VIRTIO_BALLOON_S_AVAIL,
            Stat::DiskCaches => VIRTIO_BALLOON_S_CACHES,
            Stat::HugetlbAllocations => VIRTIO_BALLOON_S_HTLB_PGALLOC,
            Stat::HugetlbFailures => VIRTIO_BALLOON_S_HTLB_PGFAIL,
            Stat::OomKills => VIRTIO_BALLOON_S_OOM_KILL,
            Stat::AllocStalls => VIRTIO_BALLOON_S_ALLOC_STALL,
            Stat::AsyncScans => VIRTIO_BALLOON_S_ASYNC_SCAN,
            Stat::DirectScans => VIRTIO_BALLOON_S_DIRECT_SCAN,
            Stat::AsyncReclaims => VIRTIO_BALLOON_S_ASYNC_RECLAIM,
            Stat::DirectReclaims => VIRTIO_BALLOON_S_DIRECT_RECLAIM,
        };
        for &stat in Stat::ALL {
            let tag = tag(stat).try_into().unwrap();
            assert_eq!(Stat::from_tag(tag), Some(stat), "{tag}");
        }
        assert_eq!(u32::try_from(Stat::ALL.len()), Ok(VIRTIO_BALLOON_S_NR));
    }

    #[test]
    fn an_old_sample_is_not_taken_for_a_new_one() {
        let mut guest = GuestQueue::new();
        let mut stats = Stats::default();
        // Another worker has requested it, or it belongs to a new driver.
        guest.send(&[&entry(5, 1 << 30)]);
        serve_with(&mut stats, &guest, Some(0));
        assert_eq!((stats.sequence(), guest.used()), (0, 1));
        guest.send(&[&entry(5, 1 << 30)]);
        serve_with(&mut stats, &guest, Some(0));
        assert_eq!((stats.sequence(), guest.used()), (1, 1));

        // The guest was paused, and its balloon has inflated.
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
        // Half of it is being inflated, and the balloon's size is not known yet.
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
        // The guest must notify the device of the buffer that it fills again.
        assert_eq!(guest.avail_event(), 1);
    }

    /// Sends statistics. Returns how many the device has read, and how many buffers it has used.
    fn report(stats: &mut Stats, guest: &mut GuestQueue, value: u64) -> (u64, u16) {
        guest.send(&[&entry(4, value)]);
        serve(stats, guest);
        (stats.sequence(), guest.used())
    }

    #[test]
    fn a_notice_replaces_the_buffer_before_it() {
        let mut guest = GuestQueue::new();
        let mut stats = Stats::default();
        guest.send(&[&entry(4, 1)]);
        serve(&mut stats, &guest);
        assert_eq!(report(&mut stats, &mut guest, 2), (1, 1));
        assert_eq!(stats.notices(), 0);
        for number in 2..5 {
            let used = u16::try_from(number).unwrap();
            assert_eq!(report(&mut stats, &mut guest, number), (number, used));
        }
        // Its content, and not its age, is that of an answer.
        assert!(stats.answer().unwrap().requested < 1000);

        assert_eq!(stats.notices(), 3);

        // A request uses the newest buffer.
        stats.want();
        serve(&mut stats, &guest);
        assert_eq!(guest.used(), 5);
        assert_eq!(report(&mut stats, &mut guest, 7), (5, 5));
        assert_eq!(stats.notices(), 3);

        // It uses both if there is a notice at the same time, which is its response.
        guest.send(&[&entry(4, 8)]);
        stats.want();
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (6, 7));
        assert_eq!(report(&mut stats, &mut guest, 9), (7, 7));

        // After a restart both may be old.
        guest.send(&[&entry(4, 10)]);
        stats.restart();
        serve(&mut stats, &guest);
        assert_eq!((stats.sequence(), guest.used()), (7, 9));
        assert_eq!(stats.notices(), 4);
    }

    #[test]
    fn a_guest_without_notices_has_one_buffer() {
        let mut guest = GuestQueue::new();
        let mut stats = at_work();
        guest.send(&[&entry(4, 1)]);
        guest.send(&[&entry(4, 2)]);
        let counters = Counters::default();
        stats.serve(
            &mut guest.vring(),
            &guest.memory,
            &counters,
            &Counter::default(),
            None,
            false,
        );
        assert_eq!((stats.sequence(), guest.used()), (1, 0));
        assert_eq!(stats.notices(), 0);
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
