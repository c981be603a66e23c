// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The requests of the front end.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use balloon_control::Changes;
use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::status::Status;
use log::{debug, error, warn};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::work::Work;
use super::{Device, GRACE, NOT_ASKED, NOTICE, RETRY, SWEEP, Sizes, TIMER, WAKE};
use crate::queues::virtqueue::{MAX_QUEUE_SIZE, Unfinished};
use crate::sync::lock;
use crate::virtio::features::Feature;
use crate::virtio::kind::{Kind, MAX_QUEUES};

/// The largest granule that fits into the configuration space's field, in bytes.
const LARGEST_GRANULE: u32 = 1 << 31;

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        MAX_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.settings.features
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, SeqCst);
        // A front end that logs writes for a migration repeats them.
        if !self.running() && !self.channel.continues() {
            self.set_unknown(true);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The queues store it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (Ok(start), Ok(length)) = (usize::try_from(offset), usize::try_from(size)) else {
            return Vec::new();
        };
        self.wait_known();
        let command = lock(&self.hints).command();
        let granule = lock(&self.sizes).granule;
        // It is at least a page, also while the memory is unknown (PS-V3).
        let granule = granule.unwrap_or(BALLOON_PAGE_SIZE);
        let granule = u32::try_from(granule).unwrap_or(LARGEST_GRANULE);
        let asked = self.asked();
        let before = self.asked.swap(asked, SeqCst);
        if before != asked {
            lock(&self.times).moved = Some(Instant::now());
        }
        if before == NOT_ASKED {
            self.repeat_first_sample();
        }
        let fields = lock(&self.state).config.read(asked, command, granule);
        let rest = fields.get(start..).unwrap_or_default();
        // The rest after the last field is zero.
        rest.iter()
            .copied()
            .chain(std::iter::repeat(0))
            .take(length)
            .collect()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        lock(&self.times).answered = Some(Instant::now());
        self.wait_known();
        let Ok(offset) = usize::try_from(offset) else {
            return Ok(());
        };
        // The front end's copy of a size that comes in messages is old.
        let has_status = Feature::Status.is_in(self.acked.load(SeqCst));
        self.change_fields(|fields| fields.write(offset, bytes, has_status));
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let mut work = lock(&self.work);
        work.memory = memory.memory().into_inner();
        let Work {
            balloon, memory, ..
        } = &mut *work;
        balloon.set_memory(memory, self.settings.granularity);
        // A guest of an earlier worker sends it only when it changes.
        let status = balloon.status();
        if status != Status::default() {
            self.change_fields(|fields| fields.set_status(status));
        }
        self.held.store(balloon.held(), SeqCst);
        *lock(&self.sizes) = Sizes {
            memory: balloon.memory(),
            granule: balloon.granule(),
            files: balloon.files(),
            hazards: balloon.hazards(),
        };
        // A notification that came while the rings were not in memory has had no effect.
        if self.running() {
            (0..MAX_QUEUES).for_each(|number| self.wake(number));
        }
        self.ask_soon();
        self.follow();
        self.publish(Changes::info);
        let large = balloon
            .granule()
            .is_some_and(|granule| granule > BALLOON_PAGE_SIZE);
        if large && self.settings.features & Feature::MustTellHost.mask() == 0 {
            // A guest can make its VMM send the memory again without end.
            self.large_granules.call_once(|| warn!(
                "the guest's memory is in huge pages, each of which is returned only if one message lists all of \
                 it; start this with --granule 2M, and several messages may list it"
            ));
        }
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::CLOEXEC)
            .inspect_err(|error| error!("cannot make an event: {error}"))
            .ok()?;
        self.exit.store(consumer.as_raw_fd(), SeqCst);
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let acked = self.acked.load(SeqCst);
        let number = usize::try_from(queue_index).ok();
        let Some(kind) = number.and_then(|number| Kind::of(number, acked)) else {
            return Ok(());
        };
        match kind {
            Kind::Inflate => {
                self.stop();
                debug!("the guest's driver stops");
            }
            Kind::Deflate => self.blocked.store(false, SeqCst),
            Kind::Stats => lock(&self.stats).restart(),
            Kind::Hinting | Kind::Reporting => {}
            Kind::Requests => lock(&self.requests).restart(),
        }
        // Unfinished batches start again where the queue continues, or never.
        *lock(&self.work).unfinished.of_mut(kind) = Unfinished::default();
        Ok(())
    }

    /// Never fails: an error would end the worker, and a guest could stop its device.
    fn handle_event(
        &self,
        event: u16,
        _evset: EventSet,
        vrings: &[VringMutex],
        _thread_id: usize,
    ) -> io::Result<()> {
        match u64::from(event) {
            WAKE => {
                // The read does not block, and its result does not matter.
                let _ = self.wake.read();
                let pending = self.pending.swap(0, SeqCst);
                for number in (0..MAX_QUEUES).filter(|number| pending & (1 << number) != 0) {
                    self.serve_queue(number, vrings);
                }
            }
            GRACE => {
                self.grace.acknowledge();
                // Another driver may have started since the timer expired.
                if self.grace().is_none() {
                    self.limit_report_time();
                    self.follow();
                    self.publish(Changes::info);
                }
            }
            RETRY => {
                self.retry.acknowledge();
                self.blocked.store(false, SeqCst);
                if let Some(number) = Kind::Deflate.number(self.acked.load(SeqCst)) {
                    self.serve_queue(number, vrings);
                }
            }
            NOTICE => self.end_notice(),
            SWEEP => {
                self.sweep.acknowledge();
                self.sweep();
            }
            TIMER => {
                self.timer.acknowledge();
                self.asked_soon();
                lock(&self.stats).want();
                if let Some(number) = Kind::Stats.number(self.acked.load(SeqCst)) {
                    self.serve_queue(number, vrings);
                }
                // The driver may not have sent them in time.
                self.follow();
            }
            _ => {
                lock(&self.times).answered = Some(Instant::now());
                let kind = Kind::of(event.into(), self.acked.load(SeqCst));
                if let Some(kind) = kind {
                    self.counters.notifications.of(kind).add(1);
                }
                self.serve_queue(event.into(), vrings);
            }
        }
        Ok(())
    }
}
