// SPDX-License-Identifier: GPL-2.0

//! The device's virtqueues.
//!
//! Specification: clause 5.5.2, Virtqueues. Devices number their queues without gaps, and omit the
//! queues of features that they do not offer (QEMU), or that were not accepted. So the driver must
//! accept each offered feature with a queue: otherwise some devices would number the following
//! queues differently. It may give up only reporting, which has the last queue of the base
//! protocol, together with all queues of the extended protocol.

#![forbid(unsafe_code)]

use crate::rust::{
    fs::debugfs::Show,
    virtio::{
        self,
        FeatureBit,
        FoundQueues,
        QueueStats,
        Virtqueue, //
    },
    virtio_balloon, //
};

use kernel::{
    device::Core,
    fmt,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};

/// Defines the queues, in the order of their numbers on a device with all queues: each with its
/// name in the kernel's log and in debugfs, and the feature that it comes with.
macro_rules! queues {
    ($($(#[$doc:meta])* $queue:ident = $name:literal, $feature:expr;)*) => {
        /// The queues of a device.
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Queue {
            $($(#[$doc])* $queue),*
        }

        impl Queue {
            /// All of them. A queue's place is its index.
            pub(crate) const ALL: [Self; [$($name),*].len()] = [$(Self::$queue),*];

            /// Returns a callback for each of them.
            pub(crate) const fn callbacks<T: QueueUsed>() -> [fn(&T); Self::ALL.len()] {
                [$(|this| this.queue_used(Self::$queue)),*]
            }

            /// Returns the queue's name.
            fn name(self) -> &'static CStr {
                match self {
                    $(Self::$queue => $name),*
                }
            }

            /// Returns the feature that the queue comes with, if not every device has it.
            pub(super) fn feature(self) -> Option<FeatureBit> {
                match self {
                    $(Self::$queue => $feature),*
                }
            }
        }
    };
}

queues! {
    /// Inflated pages.
    Inflate = c"inflate", None;
    /// Deflated pages.
    Deflate = c"deflate", None;
    /// Statistics: the device uses a buffer to request new ones.
    Stats = c"stats", Some(virtio_balloon::F_STATS_VQ);
    /// Free page hints.
    Hint = c"free_page_hint", Some(virtio_balloon::F_FREE_PAGE_HINT);
    /// Free page reports.
    Report = c"reporting", Some(virtio_balloon::F_REPORTING);
    /// Host requests, and their answers.
    Request = c"requests", Some(virtio_balloon::F_HOST_REQUESTS);
}

impl Queue {
    /// Returns whether `dev` has the queue.
    fn is_of(self, dev: &virtio::Device<Core<'_>>) -> bool {
        self.feature()
            .is_none_or(|feature| dev.has_feature(feature))
    }
}

/// A device whose queues are used.
pub(crate) trait QueueUsed {
    /// The device has used buffers of `queue`. Runs in interrupt context.
    fn queue_used(&self, queue: Queue);
}

/// The traffic of the queues since the driver was bound.
pub(crate) struct Traffic(KVec<Arc<QueueStats>>);

impl Traffic {
    /// Returns an empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let mut traffic = KVec::with_capacity(Queue::ALL.len(), GFP_KERNEL)?;

        for _ in Queue::ALL {
            traffic.push(Arc::new(QueueStats::new(), GFP_KERNEL)?, GFP_KERNEL)?;
        }
        Ok(Self(traffic))
    }
}

impl Show for Traffic {
    /// Writes a line for each queue.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (queue, traffic) in Queue::ALL.iter().zip(&self.0) {
            writeln!(
                f,
                "{} buffers {} bytes {} notifications {}",
                queue.name().to_str().unwrap_or_default(),
                traffic.buffers.load(Relaxed),
                traffic.bytes.load(Relaxed),
                traffic.notifications.load(Relaxed)
            )?;
        }
        Ok(())
    }
}

/// The feature that has taken each queue, as its place in the list of the device's features.
#[derive(Clone, Copy)]
pub(crate) struct Owners([Option<usize>; Queue::ALL.len()]);

impl Owners {
    /// Returns the owner of `queue`, if a feature has taken it.
    pub(crate) fn of(self, queue: Queue) -> Option<usize> {
        self.0.get(queue as usize).copied().flatten()
    }
}

/// The queues of a device, until the features take them.
pub(crate) struct Queues<'a> {
    found: FoundQueues<{ Queue::ALL.len() }>,
    traffic: &'a Traffic,
    /// The place of the feature that takes queues now.
    owner: usize,
    owners: Owners,
}

impl<'a> Queues<'a> {
    /// Finds the queues of the negotiated features. Their traffic is added to `traffic`.
    ///
    /// # Errors
    ///
    /// The error of [`virtio::Device::find_vqs`].
    pub(crate) fn find(dev: &virtio::Device<Core<'_>>, traffic: &'a Traffic) -> Result<Self> {
        let names = Queue::ALL.map(|queue| queue.is_of(dev).then(|| queue.name()));

        Ok(Self {
            found: dev.find_vqs(names)?,
            traffic,
            owner: 0,
            owners: Owners([None; Queue::ALL.len()]),
        })
    }

    /// Queues that are taken from now on belong to the feature at the place `owner`.
    pub(super) fn set_owner(&mut self, owner: usize) {
        self.owner = owner;
    }

    /// Returns the owners of the queues that were taken.
    pub(super) fn owners(&self) -> Owners {
        self.owners
    }

    /// Takes `queue`, for buffers of type `B`. Returns `None` if the device does not have it. The
    /// feature is called when the device has used buffers of the queue.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn take<B>(&mut self, queue: Queue) -> Result<Option<Virtqueue<B>>> {
        let index = queue as usize;
        let traffic = self.traffic.0.get(index).ok_or(ENOENT)?;
        let owner = self.owners.0.get_mut(index).ok_or(ENOENT)?;
        let taken = self.found.take(index, traffic.clone())?;

        if taken.is_some() {
            *owner = Some(self.owner);
        }
        Ok(taken)
    }
}
