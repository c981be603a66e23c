// SPDX-License-Identifier: GPL-2.0

//! The queue of host requests: received requests, and messages of answers.

#![forbid(unsafe_code)]

use crate::{
    bitmap::Encodings,
    device::log_limit::LogLimit,
    features::{
        budget::Budget,
        requests::{
            counters::Counters,
            work::{
                Open,
                Work, //
            }, //
        }, //
    },
    messages::page_sets,
    rust::{
        mm::{
            contig::contig_pages::ContigPages,
            memory, //
        },
        trace,
        virtio::{
            self,
            DeviceWritable,
            Either,
            Virtqueue, //
        },
        virtio_balloon::{
            request,
            Completion,
            Request, //
        },
        work::task::Task, //
    },
    sources::memory_blocks::Offliner, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    device::Core,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::Relaxed,
        Arc, //
    }, //
};

/// How many requests may be open, and how many the device can send at once.
const MAX_OPEN: usize = 8;

/// The maximum number of messages of answers in flight. Each is a page.
const MAX_MESSAGES: usize = 24;

/// A buffer of the queue: for a request, or a message with the memory that it owns until it is
/// used.
pub(super) type RequestQueue =
    Virtqueue<Either<DeviceWritable<Request>, (KVec<u64>, Option<ContigPages>)>>;

/// The state of the requests queue.
pub(super) struct Inner {
    pub(super) queue: RequestQueue,
    /// The encodings of answers.
    pub(super) encodings: Encodings,
    /// Requests in the order of their steps. Never more than [`MAX_OPEN`].
    pub(super) open: KVec<Open>,
    /// How many buffers for requests the device has.
    pub(super) request_buffers: usize,
    /// The number of messages in flight, and how many of them own memory.
    pub(super) messages: usize,
    pub(super) ranges: usize,
    /// A spare message, for when memory is short.
    pub(super) spare: Option<KVec<u64>>,
    pub(super) budget: Budget,
    pub(super) dev: ARef<virtio::Device>,
    pub(super) log_limit: LogLimit,
}

impl Inner {
    pub(super) fn new(dev: &virtio::Device<Core<'_>>, queue: RequestQueue) -> Result<Self> {
        Ok(Self {
            queue,
            encodings: page_sets::encodings(dev),
            open: KVec::with_capacity(MAX_OPEN, GFP_KERNEL)?,
            request_buffers: 0,
            messages: 0,
            ranges: 0,
            spare: Some(message(GFP_KERNEL)?),
            budget: Budget::new(memory::present_pages()),
            dev: (&**dev).into(),
            log_limit: LogLimit::new(),
        })
    }

    /// Makes a buffer available for each further request that may be open.
    pub(super) fn refill_request_buffers(&mut self) {
        // At least as many entries are left for answers.
        let max = MAX_OPEN.min(self.queue.size() / 2);

        while self.request_buffers + self.open.len() < max {
            let Ok(inbox) = DeviceWritable::new(GFP_KERNEL | __GFP_NOWARN) else {
                return;
            };
            if self.queue.add(Either::Left(inbox)).is_err() {
                return;
            }
            self.request_buffers += 1;
        }
    }

    /// Takes used messages and new requests. The `offliner` takes memory blocks for requests, if
    /// there is one. Returns whether there were any.
    pub(super) fn collect(&mut self, offliner: Option<&Arc<Task<Offliner>>>) -> bool {
        // A device that uses new buffers at once would make this loop endless.
        for count in 0..self.queue.size() {
            let Some((buffer, len)) = self.queue.next_used() else {
                return count > 0;
            };

            match buffer {
                Either::Left(mut inbox) => {
                    let request = inbox.take();

                    self.request_buffers -= 1;
                    // A part of a request has no id for an answer. Devices that use buffers in
                    // order return empty buffers in front of an answer.
                    if len as usize >= size_of::<Request>() {
                        self.open_request(&request, offliner);
                    }
                }
                Either::Right((mut message, range)) => {
                    self.messages -= 1;
                    self.ranges -= usize::from(range.is_some());
                    // The memory of the message is free from here on.
                    drop(range);
                    message.clear();
                    self.spare.get_or_insert(message);
                }
            }
        }
        true
    }

    fn open_request(&mut self, request: &Request, offliner: Option<&Arc<Task<Offliner>>>) {
        let id = u64::from_le(request.request_id);
        trace::request(self.queue.device(), id, u16::from_le(request.command));
        let known = id != 0 && !self.open.iter().any(|open| open.id == id);
        let legal = request.reserved == 0 && u32::from(request.block_shift) < u64::BITS;
        let work = if !known || !legal {
            Work::Complete(request::MALFORMED)
        } else if u16::from_le(request.command) == request::CANCEL {
            Work::Complete(self.cancel(u64::from_le(request.start)))
        } else {
            Work::plan(request, offliner)
        };

        // There is room, since there are no more buffers for requests than that.
        let _ = self.open.push_within_capacity(Open { id, work });
    }

    /// Cancels the request `id`. Returns the status of the cancel.
    fn cancel(&mut self, id: u64) -> u8 {
        let Some(open) = self.open.iter_mut().find(|open| open.id == id) else {
            return request::UNKNOWN_ID;
        };

        match open.work {
            // It has already ended, and only its completion is due.
            Work::Complete(_) => return request::COMPLETE,
            Work::Skip(_) | Work::Discard(_) | Work::DropCaches(_) | Work::CacheDropper(_) => (),
        }
        open.work = Work::Complete(request::CANCELLED);
        request::COMPLETE
    }

    /// Returns a message to write, unless too many are in flight.
    pub(super) fn message(&mut self) -> Option<KVec<u64>> {
        if self.messages >= MAX_MESSAGES || self.queue.room() == 0 {
            return None;
        }

        self.spare
            .take()
            .or_else(|| message(GFP_NOWAIT | __GFP_NOWARN).ok())
    }

    /// Sends `message`, which owns the memory. Returns none if the queue is full or broken.
    pub(super) fn send(&mut self, message: KVec<u64>, range: Option<ContigPages>) -> Option<()> {
        let ranges = usize::from(range.is_some());

        self.queue.add(Either::Right((message, range))).ok()?;
        self.messages += 1;
        self.ranges += ranges;
        Some(())
    }

    /// Completes the request `id`, or returns none if no message is available yet.
    pub(super) fn complete(&mut self, id: u64, status: u8) -> Option<()> {
        let mut message = self.message()?;
        let completion = Completion {
            command: request::COMPLETION.to_le(),
            status,
            reserved: 0,
            flags: 0,
            request_id: id.to_le(),
        };

        message
            .resize(size_of::<Completion>() / page_sets::WORD, 0, GFP_NOWAIT)
            .ok()?;
        page_sets::put(&mut message, &completion);
        self.send(message, None)?;
        trace::answer(self.queue.device(), id, 0, status);
        Some(())
    }

    /// Records a sent message with `pages` kernel pages.
    pub(super) fn record_sent(&self, id: u64, pages: u64, counters: &Counters) {
        counters.listed.add(pages << PAGE_SHIFT, Relaxed);
        trace::answer(self.queue.device(), id, pages as usize, 0);
    }

    pub(super) fn log_refusal(&mut self, id: u64, reason: &str) {
        if self.log_limit.allows() {
            dev_warn!(self.dev, "refused the host's request {}: {}\n", id, reason);
        }
    }
}

/// Returns a buffer for a message, which never grows.
fn message(flags: kernel::alloc::Flags) -> Result<KVec<u64>> {
    Ok(KVec::with_capacity(page_sets::WORDS_PER_MESSAGE, flags)?)
}
