// SPDX-License-Identifier: GPL-2.0

//! The device's virtqueues.
//!
//! Specification: clause 5.5.2, Virtqueues. Devices number the queues that they have one after the
//! other, and leave out those whose feature they do not offer (QEMU), or that was not accepted. So
//! a feature that has a queue must be accepted whenever it is offered, or the queues after it have
//! other numbers than some devices think. Only reporting, which has the last queue of the base
//! protocol, may be given up, and the host's requests with it.

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

/// What the device notifies the driver of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// Pages have been taken note of: inflating.
    Inflate = 0,
    /// Pages have been taken note of: deflating.
    Deflate = 1,
    /// The device wants new statistics.
    Stats = 2,
    /// Hints have been taken note of.
    Hint = 3,
    /// Free pages have been taken note of.
    Report = 4,
    /// The device has a request, or has taken note of answers.
    Request = 5,
}

impl Queue {
    /// All of them, in the order of their numbers on a device that has them all.
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

/// What has gone through the queues since the driver was bound.
pub(crate) struct Traffic([Arc<QueueStats>; Queue::ALL.len()]);

impl Traffic {
    /// Begins with nothing.
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
    /// Finds the queues of the features that were negotiated. What goes through the queues is added
    /// to `traffic`.
    ///
    /// # Errors
    ///
    /// What [`virtio::Device::find_vqs`] says.
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
