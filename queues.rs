// SPDX-License-Identifier: GPL-2.0

//! The device's virtqueues.
//!
//! Specification: clause 5.5.2, Virtqueues. Devices number the queues that they have one after the
//! other, and leave out those whose feature they do not offer (QEMU), or that was not accepted. So
//! a feature that has a queue must be accepted whenever it is offered, or the queues after it have
//! other numbers than some devices think. Only reporting, which has the last queue of the base
//! protocol, may be given up, and the host's requests with it.

#![forbid(unsafe_code)]

use crate::{
    bitmap::Encoding,
    hinting::HintQueue,
    host_requests::RequestQueue,
    message::{
        Command,
        Format,
        MessageQueue, //
    },
    reporting::ReportingQueue,
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
    /// Hints have been taken note of.
    Hint = 3,
    /// Free pages have been taken note of.
    Report = 4,
    /// The device has a request, or has taken note of answers.
    Request = 5,
}

impl Queue {
    /// Returns the queue with an index as in [`Queues::find`].
    pub(crate) fn from_index(index: usize) -> Option<Self> {
        [
            Self::Inflate,
            Self::Deflate,
            Self::Stats,
            Self::Hint,
            Self::Report,
            Self::Request,
        ]
        .get(index)
        .copied()
    }
}

/// The queues, for those who use them.
pub(crate) struct Queues {
    pub(crate) inflate: MessageQueue,
    pub(crate) deflate: MessageQueue,
    pub(crate) stats: Option<StatsQueue>,
    pub(crate) hints: Option<HintQueue>,
    pub(crate) reports: Option<ReportingQueue>,
    pub(crate) requests: Option<RequestQueue>,
}

impl Queues {
    /// Finds the queues of the features that were negotiated. Page sets have the encoding `forced`,
    /// if there is one.
    ///
    /// # Errors
    ///
    /// What [`virtio::Device::find_vqs`] says.
    pub(crate) fn find(dev: &virtio::Device<Core<'_>>, forced: Option<Encoding>) -> Result<Self> {
        let has = |feature| dev.has_feature(feature);
        let format = if has(virtio_balloon::F_PAGE_SETS) {
            Format::PageSets(forced)
        } else {
            Format::Pfns(dev.byte_order())
        };
        let mut found = dev.find_vqs([
            Some(c"inflate"),
            Some(c"deflate"),
            has(virtio_balloon::F_STATS_VQ).then_some(c"stats"),
            has(virtio_balloon::F_FREE_PAGE_HINT).then_some(c"free_page_hint"),
            has(virtio_balloon::F_REPORTING).then_some(c"reporting"),
            has(virtio_balloon::F_HOST_REQUESTS).then_some(c"requests"),
        ])?;

        Ok(Self {
            inflate: MessageQueue::new(
                found.take(Queue::Inflate as usize)?,
                format,
                Command::Inflate,
            )?,
            deflate: MessageQueue::new(
                found.take(Queue::Deflate as usize)?,
                format,
                Command::Deflate,
            )?,
            stats: has(virtio_balloon::F_STATS_VQ)
                .then(|| found.take(Queue::Stats as usize))
                .transpose()?,
            hints: has(virtio_balloon::F_FREE_PAGE_HINT)
                .then(|| found.take(Queue::Hint as usize))
                .transpose()?,
            reports: has(virtio_balloon::F_REPORTING)
                .then(|| found.take(Queue::Report as usize))
                .transpose()?,
            requests: has(virtio_balloon::F_HOST_REQUESTS)
                .then(|| found.take(Queue::Request as usize))
                .transpose()?,
        })
    }
}
