// SPDX-License-Identifier: GPL-2.0

//! The device's virtqueues.
//!
//! Specification: clause 5.5.2, Virtqueues. Devices number their queues without gaps, and omit the
//! queues of features that they do not offer (QEMU), or that were not accepted. So the driver must
//! accept each offered feature with a queue: otherwise some devices would number the following
//! queues differently. It may give up only reporting, which has the last queue of the base
//! protocol, together with host requests.

#![forbid(unsafe_code)]

use crate::rust::{
    fs::debugfs::Show,
    virtio::{
        self,
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

/// The queues of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// Inflated pages.
    Inflate = 0,
    /// Deflated pages.
    Deflate = 1,
    /// Statistics: the device uses a buffer to request new ones.
    Stats = 2,
    /// Free page hints.
    Hint = 3,
    /// Free page reports.
    Report = 4,
    /// Host requests, and their answers.
    Request = 5,
}

impl Queue {
    /// All of them, in the order of their numbers on a device with all queues.
    pub(crate) const ALL: [Self; 6] = [
        Self::Inflate,
        Self::Deflate,
        Self::Stats,
        Self::Hint,
        Self::Report,
        Self::Request,
    ];

    /// Returns the queue's name, in the kernel's log and in debugfs.
    fn name(self) -> &'static CStr {
        match self {
            Self::Inflate => c"inflate",
            Self::Deflate => c"deflate",
            Self::Stats => c"stats",
            Self::Hint => c"free_page_hint",
            Self::Report => c"reporting",
            Self::Request => c"requests",
        }
    }

    /// Returns whether `dev` has the queue.
    fn is_of(self, dev: &virtio::Device<Core<'_>>) -> bool {
        dev.has_feature(match self {
            Self::Inflate | Self::Deflate => return true,
            Self::Stats => virtio_balloon::F_STATS_VQ,
            Self::Hint => virtio_balloon::F_FREE_PAGE_HINT,
            Self::Report => virtio_balloon::F_REPORTING,
            Self::Request => virtio_balloon::F_HOST_REQUESTS,
        })
    }
}

// A queue's place in the list is its index, in `Queues::take` and in `Bound::QUEUE_CALLBACKS`.
const _: () = {
    let mut n = 0;

    while n < Queue::ALL.len() {
        assert!(Queue::ALL[n] as usize == n);
        n += 1;
    }
};

/// The traffic of the queues since the driver was bound.
pub(crate) struct Traffic([Arc<QueueStats>; Queue::ALL.len()]);

impl Traffic {
    /// Returns an empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let new = || Arc::new(QueueStats::new(), GFP_KERNEL);

        Ok(Self([new()?, new()?, new()?, new()?, new()?, new()?]))
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

/// The queues of a device, until the features take them.
pub(crate) struct Queues<'a> {
    found: FoundQueues<{ Queue::ALL.len() }>,
    traffic: &'a Traffic,
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
        })
    }

    /// Takes `queue`, for buffers of type `B`. Returns `None` if the device does not have it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn take<B>(&mut self, queue: Queue) -> Result<Option<Virtqueue<B>>> {
        let index = queue as usize;
        let traffic = self.traffic.0.get(index).ok_or(ENOENT)?;

        self.found.take(index, traffic.clone())
    }
}
