// SPDX-License-Identifier: GPL-2.0

//! The device's virtqueues.
//!
//! Specification: clause 5.5.2, Virtqueues. Devices number the queues that they have one after the other, and
//! leave out those whose feature they do not offer; so a feature that has a queue must be accepted whenever
//! it is offered, or all the queues after it have other numbers than the device thinks.

#![forbid(unsafe_code)]

use crate::{
    message::MessageQueue,
    stats::StatsQueue,
    virtio,
    virtio_balloon, //
};

use kernel::{
    device::Core,
    prelude::*, //
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
}

impl Queue {
    /// Returns the queue with an index as in [`Queues::find`].
    pub(crate) fn from_index(index: usize) -> Option<Self> {
        [Self::Inflate, Self::Deflate, Self::Stats]
            .get(index)
            .copied()
    }
}

/// The queues, for those who use them.
pub(crate) struct Queues {
    pub(crate) inflate: MessageQueue,
    pub(crate) deflate: MessageQueue,
    pub(crate) stats: Option<StatsQueue>,
}

impl Queues {
    /// Finds the queues of the features that were negotiated.
    ///
    /// # Errors
    ///
    /// What [`virtio::Device::find_vqs`] says.
    pub(crate) fn find(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
        let byte_order = dev.byte_order();
        let has_stats = dev.has_feature(virtio_balloon::F_STATS_VQ);
        let mut found = dev.find_vqs([
            Some(c"inflate"),
            Some(c"deflate"),
            has_stats.then_some(c"stats"),
        ])?;

        Ok(Self {
            inflate: MessageQueue::new(found.take(Queue::Inflate as usize)?, byte_order)?,
            deflate: MessageQueue::new(found.take(Queue::Deflate as usize)?, byte_order)?,
            stats: if has_stats {
                Some(found.take(Queue::Stats as usize)?)
            } else {
                None
            },
        })
    }
}
