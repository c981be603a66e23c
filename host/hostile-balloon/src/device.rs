// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as its driver sees it, with any transport: its features, its configuration space, and
//! its queues.

use std::iter;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use balloon_wire::config;
use fastrand::Rng;
use vhost_user_balloon::virtio::kind::MAX_QUEUES;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_IN_ORDER;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::ring::{Memo, RawQueue, Ring};

/// The transport between the device and its driver.
pub(crate) trait Transport: Send + Sync {
    /// Serves the first front end that connects to `socket`, until it disconnects. Calls `announce` when a front end
    /// can connect, and `begin` when one has.
    fn serve(
        self: Arc<Self>,
        socket: &Path,
        announce: &dyn Fn(),
        begin: Box<dyn FnOnce()>,
    ) -> Result<()>;

    /// Calls a function on the queue of this number, if there is one.
    fn with_queue(&self, number: usize, act: &mut dyn FnMut(&mut dyn RawQueue));

    /// Announces a change of the configuration space.
    fn config_changed(&self);

    /// Sets `DEVICE_NEEDS_RESET`, if it is a whole PCI device.
    fn need_reset(&self);

    /// Whether it is a whole PCI device, so that the driver's transport accesses it directly.
    fn is_pci(&self) -> bool;
}

/// What a device does when its driver accesses registers, in addition to what the transport does.
pub(crate) trait Watch: Send + Sync {
    /// The driver has written `status`. The status was `before`.
    fn sets_status(&self, transport: &dyn Transport, before: u8, status: u8);

    /// The driver has written a register of a queue while the device has this status.
    fn sets_up_queue(&self, status: u8);

    /// The driver reads a part of the configuration space.
    fn reads_config(&self, offset: u64, length: usize);

    /// The driver writes a part of the configuration space.
    fn writes_config(&self, offset: u64, bytes: &[u8]);

    /// The driver notifies the device of messages in a queue.
    fn notifies(&self, transport: &dyn Transport, queue: u16);
}

/// The configuration space.
#[derive(Debug)]
pub(crate) struct Config {
    /// The fields: the target, and those after it.
    pub(crate) fields: [u32; config::SIZE / 4],
    /// Whether they change with every read.
    pub(crate) wild: bool,
    random: Rng,
}

/// A device that executes any action, legal or not.
pub(crate) struct Device {
    features: u64,
    acked: AtomicU64,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    config: Mutex<Config>,
    /// Locked before the queues themselves.
    memos: Mutex<[Memo; MAX_QUEUES]>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number for a field: small ones, which a driver can use, and all extremes.
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
            memos: Mutex::default(),
        }
    }

    /// The features that it offers.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// The guest's memory, which the transport keeps up to date.
    pub(crate) fn memory(&self) -> GuestMemoryAtomic<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// The features that the driver has accepted.
    pub(crate) fn acked(&self) -> u64 {
        self.acked.load(SeqCst)
    }

    /// Sets the features that the driver has accepted.
    pub(crate) fn set_acked(&self, features: u64) {
        self.acked.store(features, SeqCst);
    }

    /// The configuration space.
    pub(crate) fn config(&self) -> MutexGuard<'_, Config> {
        lock(&self.config)
    }

    /// The result of a read of the configuration space: `size` bytes from `offset` on.
    pub(crate) fn read_config(&self, offset: usize, size: usize) -> Vec<u8> {
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
        bytes
            .chain(iter::repeat(0))
            .skip(offset)
            .take(size)
            .collect()
    }

    /// Calls a function on a queue of `transport`, if the queue is ready.
    pub(crate) fn with_ring<T>(
        &self,
        transport: &dyn Transport,
        number: usize,
        act: impl FnOnce(Ring<'_>) -> T,
    ) -> Option<T> {
        let mut memos = lock(&self.memos);
        let memo = memos.get_mut(number)?;
        // With that feature, one used buffer stands for all before it.
        memo.has_lied |= self.acked() & (1 << VIRTIO_F_IN_ORDER) != 0;
        let memory = self.memory.memory();
        let mut act = Some(act);
        let mut result = None;
        transport.with_queue(number, &mut |raw| {
            if let Some(ring) = Ring::new(raw, &memory, memo) {
                result = act.take().map(|act| act(ring));
            }
        });
        result
    }

    /// Discards the state of a stopped queue.
    pub(crate) fn forget(&self, number: usize) {
        if let Some(memo) = lock(&self.memos).get_mut(number) {
            *memo = Memo::default();
        }
    }
}
