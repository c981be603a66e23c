// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as the front end sees it: its features, its configuration space, and its queues.

use std::io;
use std::iter;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use balloon_wire::config;
use fastrand::Rng;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use vhost_user_balloon::queue::{MAX_QUEUE_SIZE, MAX_QUEUES};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_IN_ORDER;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::ring::{Memo, Ring};

/// The configuration space.
#[derive(Debug)]
pub(crate) struct Config {
    /// What the fields hold: the target, then what comes after it.
    pub(crate) fields: [u32; config::SIZE / 4],
    /// Whether they change with every read.
    pub(crate) wild: bool,
    random: Rng,
}

/// A device that does what it is told to, whatever that is.
pub(crate) struct Device {
    features: u64,
    acked: AtomicU64,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    config: Mutex<Config>,
    vrings: OnceLock<Vec<VringMutex>>,
    /// Locked before the queues themselves.
    memos: Mutex<[Memo; MAX_QUEUES]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that may be in a field: small ones, which a driver can do something with, and all extremes.
pub(crate) fn any_field(random: &mut Rng) -> u32 {
    match random.u8(..8) {
        0 => 0,
        1 => random.u32(..4),
        2 => u32::MAX,
        3 => 1 << random.u32(..32),
        4 => random.u32(..),
        // Up to 512 MiB, as a target.
        _ => random.u32(..1 << 17),
    }
}

impl Device {
    /// A device that offers these features, with `random` numbers in its configuration space.
    pub(crate) fn new(features: u64, random: Rng) -> Self {
        Self {
            features,
            acked: AtomicU64::new(0),
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::default()),
            config: Mutex::new(Config {
                fields: [0; config::SIZE / 4],
                wild: false,
                random,
            }),
            vrings: OnceLock::new(),
            memos: Mutex::default(),
        }
    }

    /// The memory that the library is to keep up to date.
    pub(crate) fn memory(&self) -> GuestMemoryAtomic<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// The features that the driver has accepted.
    pub(crate) fn acked(&self) -> u64 {
        self.acked.load(SeqCst)
    }

    /// The configuration space.
    pub(crate) fn config(&self) -> MutexGuard<'_, Config> {
        lock(&self.config)
    }

    /// Does something with a queue, if it is ready.
    pub(crate) fn with_ring<T>(&self, number: usize, act: impl FnOnce(Ring<'_>) -> T) -> Option<T> {
        let mut memos = lock(&self.memos);
        let mut vring = self.vrings.get()?.get(number)?.get_mut();
        let memory = self.memory.memory();
        let memo = memos.get_mut(number)?;
        // With that, one buffer that is used stands for all before it.
        memo.has_lied |= self.acked() & (1 << VIRTIO_F_IN_ORDER) != 0;
        Ring::new(&mut vring, &memory, memo).map(act)
    }
}

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
        self.features
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, SeqCst);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The index at which the driver is to notify the device is written as the seed has it.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.config();
        let Config {
            fields,
            wild,
            random,
        } = &mut *config;
        if *wild {
            fields.fill_with(|| any_field(random));
        }
        let bytes = fields.iter().flat_map(|field| field.to_le_bytes());
        let (start, length) = (usize::try_from(offset), usize::try_from(size));
        bytes
            .chain(iter::repeat(0))
            .skip(start.unwrap_or(usize::MAX))
            .take(length.unwrap_or(0))
            .collect()
    }

    /// What the driver says is of no interest.
    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let number = usize::try_from(queue_index).unwrap_or(usize::MAX);
        if let Some(memo) = lock(&self.memos).get_mut(number) {
            *memo = Memo::default();
        }
        Ok(())
    }

    /// The queues are looked at all the time: what matters is that they are there.
    fn handle_event(
        &self,
        _event: u16,
        _evset: EventSet,
        vrings: &[VringMutex],
        _thread_id: usize,
    ) -> io::Result<()> {
        self.vrings.get_or_init(|| vrings.to_vec());
        Ok(())
    }
}
