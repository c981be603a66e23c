// SPDX-License-Identifier: GPL-2.0

//! Requests of the host: unused pages, dropping caches.
//!
//! The device has buffers of the driver's that it fills in, one for each request; the answers go
//! through the same queue, each message with the request's id, and the last one is a completion.
//! Several requests may be open. They take turns, message by message, and between two messages the
//! driver looks for new requests, so that nothing waits for a long answer, and calling one off
//! takes effect at once.
//!
//! What the host can cost the guest is bounded: the memory for answers ([`MAX_OPEN`],
//! [`MAX_MESSAGES`]), what is kept from being used ([`CLAIM_PAGES`]), and the time ([`Budget`]).
//!
//! What an answer means is said in [`free_pages`](crate::free_pages), and in docs/protocol.md,
//! section 5.

#![forbid(unsafe_code)]

use crate::{
    bitmap::Run,
    device::{
        feature::{
            Feature,
            Quiesce,
            Setup, //
        },
        log_limit::LogLimit,
        queues::{
            Queue,
            Queues, //
        },
        settings::Settings,
        timeouts, //
    },
    features::budget::Budget,
    free_pages::{
        Unused,
        Walk, //
    },
    messages::{
        page_sets,
        runs::Runs, //
    },
    rust::{
        fs::debugfs,
        mm::{
            caches::Dropping,
            claim::Claim,
            memory,
            memory_blocks::MemoryBlock,
            zone::{
                Hold,
                PLACES_PER_HOLD, //
            }, //
        },
        trace,
        virtio::{
            self,
            Either,
            Inbox,
            Virtqueue, //
        },
        virtio_balloon::{
            request,
            Completion,
            Request, //
        },
        work::{
            task::{
                new_slot,
                Job,
                Task,
                Waker, //
            },
            thread::Thread, //
        }, //
    },
    sources::memory_blocks::Taker, //
};

use core::mem;
use kernel::{
    alloc::flags::__GFP_NOWARN,
    device::Core,
    new_mutex,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic,
        Msecs, //
    }, //
};

/// How many requests may be open, and how many the device can make at once.
const MAX_OPEN: usize = 8;

/// How many messages of answers the device has at most. Each is a page.
const MAX_MESSAGES: usize = 24;

/// How many times a zone's lock is taken for one message.
const HOLDS_PER_MESSAGE: usize = 16;

/// How many turns there are in one run of the task.
const TURNS_PER_RUN: usize = 64;

/// How many kernel pages are kept from being used for one message, unless a page block is larger,
/// and for how many messages: 64 MiB, four times.
const CLAIM_PAGES: u64 = 1 << (26 - PAGE_SHIFT);
const MAX_CLAIMS: usize = 4;

/// The first of these where the kernel writes to what is claimed, so that the host needs hardly
/// more memory for a while: 4 MiB.
const ZEROED_CLAIM_PAGES: u64 = 1 << (22 - PAGE_SHIFT);

/// For how many messages memory blocks are kept from being used, and how many kernel pages of them
/// are ready for the next message before the driver takes no more for now.
const MAX_BLOCKS: usize = 2;
const MOST_READY: usize = 1;

/// What dropping caches costs of the budget at least, in nanoseconds: the kernel logs a line for it
/// each time.
const DROPPING: i64 = 500_000_000;

/// What the queue carries: requests, or messages with the memory that belongs to them until they
/// are used.
type RequestQueue = Virtqueue<Either<Inbox<Request>, (KVec<u64>, Option<Claim>)>>;

/// A request that was not completed.
struct Open {
    id: u64,
    work: Work,
}

impl Open {
    /// Returns whether memory blocks are to be taken for the request.
    fn needs_blocks(&self) -> bool {
        matches!(&self.work, Work::Discard(discard) if discard.blocks.is_some())
    }
}

/// What is left to be done for a request.
enum Work {
    /// To name what the walk finds.
    Skip(Walk),
    /// To name memory, and keep it from being used.
    Discard(Discard),
    /// To drop caches, which another request may be doing just now.
    DropCaches(Caches),
    /// Caches are being dropped.
    Dropping(Thread),
    /// To say that it is over, and how it went.
    Complete(u8),
}

/// What is left to be named of memory that is kept from being used.
struct Discard {
    /// Memory blocks come first, if they are taken at all.
    blocks: Option<Blocks>,
    /// The walk's memory comes next, except for these blocks.
    walk: Walk,
    named: KVec<MemoryBlock>,
}

/// Memory blocks that are taken for a request.
struct Blocks {
    taker: Arc<Task<Taker>>,
    is_begun: bool,
}

/// What caches to drop.
#[derive(Clone, Copy)]
struct Caches {
    pages: bool,
    slab: bool,
}

/// What can be seen in debugfs.
#[pin_data]
struct Counters {
    /// What was named, in bytes.
    #[pin]
    named: debugfs::File<Atomic<u64>>,
    /// What of that was taken as memory blocks, in bytes.
    #[pin]
    blocks: debugfs::File<Atomic<u64>>,
    /// The longest time for which a zone's lock was held, in nanoseconds.
    #[pin]
    longest_hold: debugfs::File<Atomic<u64>>,
    /// The most places that were looked at meanwhile.
    #[pin]
    most_places: debugfs::File<Atomic<u64>>,
    /// The requests that are open.
    #[pin]
    open: debugfs::File<Atomic<u64>>,
    /// The requests that were completed, and those of them that could not be done.
    #[pin]
    completed: debugfs::File<Atomic<u64>>,
    #[pin]
    refused: debugfs::File<Atomic<u64>>,
}

impl Counters {
    fn new(dir: &debugfs::Dir) -> impl PinInit<Self> + use<'_> {
        pin_init!(Self {
            named <- dir.file(c"unused_named_bytes", Atomic::new(0)),
            blocks <- dir.file(c"unused_block_bytes", Atomic::new(0)),
            longest_hold <- dir.file(c"unused_longest_hold_ns", Atomic::new(0)),
            most_places <- dir.file(c"unused_most_places_per_hold", Atomic::new(0)),
            open <- dir.file(c"requests_open", Atomic::new(0)),
            completed <- dir.file(c"requests_completed", Atomic::new(0)),
            refused <- dir.file(c"requests_refused", Atomic::new(0)),
        })
    }

    fn held(&self, hold: Hold) {
        let time = u64::try_from(hold.time.as_nanos()).unwrap_or(0);

        // There is one task.
        self.longest_hold
            .store(self.longest_hold.load(Relaxed).max(time), Relaxed);
        self.most_places.store(
            self.most_places.load(Relaxed).max(hold.places as u64),
            Relaxed,
        );
    }
}

/// The requests of a device.
#[pin_data]
pub(crate) struct HostRequests {
    #[pin]
    inner: Mutex<Inner>,
    /// How long dropping caches took that the budget has not been charged for, in nanoseconds.
    spent: Arc<Atomic<i64>>,
    waker: Waker,
    settings: Arc<Settings>,
    /// What takes memory blocks, where that is better than to allocate memory.
    taker: Option<Arc<Task<Taker>>>,
    #[pin]
    counters: Counters,
    /// What times are counted from.
    start: Instant<Monotonic>,
}

struct Inner {
    queue: RequestQueue,
    /// Requests in the order of their turns. Never more than [`MAX_OPEN`].
    open: KVec<Open>,
    /// How many buffers for requests the device has.
    inboxes: usize,
    /// How many messages the device has, and how many of them with memory.
    messages: usize,
    claims: usize,
    /// A message that is not in use, so that there is one when memory is short.
    spare: Option<KVec<u64>>,
    budget: Budget,
    dev: ARef<virtio::Device>,
    log_limit: LogLimit,
}

/// What a request has come to in its turn.
enum Turn {
    /// It goes on.
    Again,
    /// It has to wait for the device, or for caches to be dropped.
    Wait,
    /// It is completed.
    Over,
}

impl Inner {
    fn new(dev: &virtio::Device<Core<'_>>, queue: RequestQueue) -> Result<Self> {
        Ok(Self {
            queue,
            open: KVec::with_capacity(MAX_OPEN, GFP_KERNEL)?,
            inboxes: 0,
            messages: 0,
            claims: 0,
            spare: Some(message(GFP_KERNEL)?),
            budget: Budget::new(),
            dev: (&**dev).into(),
            log_limit: LogLimit::new(),
        })
    }

    /// Has the device have as many buffers for requests as there may be more of.
    fn invite(&mut self) {
        // At least as many are left for answers.
        let max = MAX_OPEN.min(self.queue.size() / 2);

        while self.inboxes + self.open.len() < max {
            let Ok(inbox) = Inbox::new(GFP_KERNEL | __GFP_NOWARN) else {
                return;
            };
            if self.queue.add(Either::Left(inbox)).is_err() {
                return;
            }
            self.inboxes += 1;
        }
    }

    /// Takes what the device has used, and what it has asked for.
    fn collect(&mut self, requests: &HostRequests) {
        // A device that uses what it is offered at once would never come to an end.
        for _ in 0..self.queue.size() {
            let Some((buffer, len)) = self.queue.next_used() else {
                return;
            };

            match buffer {
                Either::Left(mut inbox) => {
                    let request = inbox.take();

                    self.inboxes -= 1;
                    // A part of a request has no id to answer to. Devices that use buffers in order
                    // return those that an answer is behind with nothing in them.
                    if len as usize >= size_of::<Request>() {
                        self.open_request(&request, requests);
                    }
                }
                Either::Right((mut message, claim)) => {
                    self.messages -= 1;
                    self.claims -= usize::from(claim.is_some());
                    // What was kept is free from here on.
                    drop(claim);
                    message.clear();
                    self.spare.get_or_insert(message);
                }
            }
        }
    }

    fn open_request(&mut self, request: &Request, requests: &HostRequests) {
        let id = u64::from_le(request.request_id);
        trace::request(self.queue.device(), id, u16::from_le(request.command));
        let known = id != 0 && !self.open.iter().any(|open| open.id == id);
        let legal = request.reserved == 0 && u32::from(request.block_shift) < u64::BITS;
        let work = if known && legal {
            self.plan(request, requests)
        } else {
            Work::Complete(request::MALFORMED)
        };

        // There is room, since there are not more buffers for requests.
        let _ = self.open.push_within_capacity(Open { id, work });
    }

    fn plan(&mut self, request: &Request, requests: &HostRequests) -> Work {
        match u16::from_le(request.command) {
            // Where free pages have to hold some value, a copy must not lack it; and the kernel
            // would write to all pages that were discarded, when they are free again.
            request::UNUSED_SKIP | request::UNUSED_DISCARD
                if memory::free_page_value().is_some() =>
            {
                Work::Complete(request::ABORTED)
            }
            request::UNUSED_SKIP => match walk(request, 0, PLACES_PER_HOLD) {
                Ok(walk) => Work::Skip(walk),
                Err(_) => Work::Complete(request::ABORTED),
            },
            // No more at a time than what is taken at once: what lies beyond would have to be
            // looked at again.
            request::UNUSED_DISCARD => match walk(
                request,
                memory::page_block_order(),
                (claim_pages() >> memory::page_block_order()) as usize,
            ) {
                Ok(walk) => Work::Discard(Discard {
                    // They may lie anywhere.
                    blocks: requests
                        .blocks()
                        .filter(|_| request.start == 0 && request.end == 0),
                    walk,
                    named: KVec::new(),
                }),
                Err(_) => Work::Complete(request::ABORTED),
            },
            request::DROP_CACHES => {
                let caches = u32::from_le(request.caches);
                let all = request::CACHES_PAGES | request::CACHES_SLAB;

                if caches == 0 || caches & !all != 0 {
                    return Work::Complete(request::MALFORMED);
                }
                Work::DropCaches(Caches {
                    pages: caches & request::CACHES_PAGES != 0,
                    slab: caches & request::CACHES_SLAB != 0,
                })
            }
            request::CANCEL => Work::Complete(self.cancel(u64::from_le(request.start))),
            _ => Work::Complete(request::UNSUPPORTED),
        }
    }

    /// Calls the request `id` off. Returns the status of the request to do so.
    fn cancel(&mut self, id: u64) -> u8 {
        let Some(open) = self.open.iter_mut().find(|open| open.id == id) else {
            return request::UNKNOWN_ID;
        };

        match open.work {
            // It is over already, and only has to be told.
            Work::Complete(_) => return request::COMPLETE,
            Work::Skip(_) | Work::Discard(_) | Work::DropCaches(_) | Work::Dropping(_) => (),
        }
        open.work = Work::Complete(request::CANCELLED);
        request::COMPLETE
    }

    /// Returns a message to be written, unless the device has enough of them.
    fn message(&mut self) -> Option<KVec<u64>> {
        if self.messages >= MAX_MESSAGES || self.queue.room() == 0 {
            return None;
        }

        self.spare
            .take()
            .or_else(|| message(GFP_NOWAIT | __GFP_NOWARN).ok())
    }

    /// Sends `message`, with the memory that belongs to it, unless there is nobody to send it to.
    fn send(&mut self, message: KVec<u64>, claim: Option<Claim>) -> Option<()> {
        let claims = usize::from(claim.is_some());

        self.queue.add(Either::Right((message, claim))).ok()?;
        self.messages += 1;
        self.claims += claims;
        Some(())
    }

    /// Gives `open` its turn.
    fn turn(&mut self, open: &mut Open, requests: &HostRequests) -> Turn {
        let counters = &requests.counters;
        let step = match &mut open.work {
            Work::Skip(walk) => self.skip(open.id, walk, counters),
            Work::Discard(discard) => match &mut discard.blocks {
                Some(blocks) => {
                    let step = self.discard_block(open.id, blocks, &mut discard.named, counters);

                    if step == Some(None) {
                        discard.blocks = None;
                    }
                    step.map(|_| None)
                }
                None => self.discard(open.id, discard, requests),
            },
            Work::DropCaches(caches) => match requests.drop_caches(*caches) {
                Some(Ok(thread)) => {
                    open.work = Work::Dropping(thread);
                    None
                }
                Some(Err(_)) => Some(Some(request::ABORTED)),
                None => None,
            },
            Work::Dropping(thread) => thread.outcome().map(|outcome| match outcome {
                Ok(()) => Some(request::COMPLETE),
                Err(_) => Some(request::ABORTED),
            }),
            Work::Complete(status) => {
                let status = *status;

                return match self.complete(open.id, status) {
                    Some(()) => {
                        counters.completed.add(1, Relaxed);
                        if let Some(reason) = refusal(status) {
                            counters.refused.add(1, Relaxed);
                            self.log_refusal(open.id, reason);
                        }
                        Turn::Over
                    }
                    None => Turn::Wait,
                };
            }
        };

        match step {
            None => Turn::Wait,
            Some(None) => Turn::Again,
            Some(Some(status)) => {
                open.work = Work::Complete(status);
                Turn::Again
            }
        }
    }

    /// Completes the request `id`, or returns none if that has to wait.
    fn complete(&mut self, id: u64, status: u8) -> Option<()> {
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

    /// A message that names `pages` kernel pages has been sent.
    fn named(&self, id: u64, pages: u64, counters: &Counters) {
        counters.named.add(pages << PAGE_SHIFT, Relaxed);
        trace::answer(self.queue.device(), id, pages as usize, 0);
    }

    fn log_refusal(&mut self, id: u64, reason: &str) {
        if self.log_limit.allows() {
            dev_warn!(self.dev, "refused the host's request {}: {}\n", id, reason);
        }
    }

    /// Sends a message about unused pages. Returns the status if it was the last one; none if it
    /// has to wait.
    fn skip(&mut self, id: u64, walk: &mut Walk, counters: &Counters) -> Option<Option<u8>> {
        let mut message = self.message()?;
        let mut unused = Unused::new(walk, HOLDS_PER_MESSAGE, |hold| counters.held(hold));

        if unused.first().is_some() {
            let written =
                page_sets::write(&mut message, request::UNUSED_SKIP, id, None, &mut unused);

            let over = unused.is_over();
            let pages = written.ok()?;
            self.send(message, None)?;
            self.named(id, pages, counters);
            Some(over.then_some(request::COMPLETE))
        } else {
            let over = unused.is_over();
            self.spare.get_or_insert(message);
            Some(over.then_some(request::COMPLETE))
        }
    }

    /// Sends a message about pages that are kept from being used until the device has used it.
    /// Returns the status if it was the last one; none if it has to wait.
    fn discard(
        &mut self,
        id: u64,
        discard: &mut Discard,
        requests: &HostRequests,
    ) -> Option<Option<u8>> {
        let walk = &mut discard.walk;
        let counters = &requests.counters;
        let floor = requests.settings.floor_pages();
        if self.claims >= MAX_CLAIMS {
            return None;
        }
        // What the guest needs comes first.
        let _taking = memory::Taking::begin();
        let spare = (memory::spare_pages(floor) as u64).min(claim_pages());
        if spare < 1 << memory::page_block_order() {
            // What the device has now may be all that it takes.
            return (self.claims == 0).then_some(Some(request::ABORTED));
        }
        let mut message = self.message()?;
        let mut unused = Unused::new(walk, HOLDS_PER_MESSAGE, |hold| counters.held(hold));

        // Blocks that lie side by side are taken together: it is the taking that costs.
        let found = unused.side_by_side(spare);
        let over = found.is_none() && unused.is_over();
        if let Some((zone, run)) = found {
            let block = MemoryBlock::of(run.first(), MemoryBlock::pages());

            if let Some(block) = block.filter(|block| discard.named.contains(block)) {
                walk.go_on_at(zone, block.pfns().end);
                self.spare.get_or_insert(message);
                return Some(None);
            }
        }
        let claim = found.and_then(|(_, run)| Claim::new(run.first(), run.len()));
        let claimed = claim.as_ref().map_or(0, Claim::len);

        // What was in use after all, or cannot be had, is passed over. What comes after that is
        // looked at again.
        if let Some((zone, run)) = found.filter(|(_, run)| claimed < run.len()) {
            walk.go_on_at(zone, run.first() + claimed.max(1));
        }
        let mut run = found.and_then(|(_, run)| Run::new(run.first(), claimed));

        match claim {
            Some(claim) => {
                let written =
                    page_sets::write(&mut message, request::UNUSED_DISCARD, id, None, &mut run);

                let pages = written.ok()?;
                self.send(message, Some(claim))?;
                self.named(id, pages, counters);
            }
            None => {
                self.spare.get_or_insert(message);
            }
        }
        Some(over.then_some(request::COMPLETE))
    }

    /// Sends a message about a part of a memory block that is kept from being used until the device
    /// has used it, and that the kernel has not written to. Returns how many kernel pages it has,
    /// none if there are no more blocks; none at all if it waits for the device or the taker.
    fn discard_block(
        &mut self,
        id: u64,
        blocks: &mut Blocks,
        named: &mut KVec<MemoryBlock>,
        counters: &Counters,
    ) -> Option<Option<u64>> {
        let taker = &blocks.taker;
        if self.claims >= MAX_BLOCKS {
            return None;
        }
        if !blocks.is_begun {
            blocks.is_begun = true;
            taker.begin(usize::MAX);
        }
        if taker.ready() == 0 {
            return (!taker.is_busy()).then_some(None);
        }

        let mut message = self.message()?;
        let (first, pages) = taker.take_adjacent()?;
        let claim = Claim::of(pages);
        let mut run = Run::new(first, claim.len());
        let written = page_sets::write(&mut message, request::UNUSED_DISCARD, id, None, &mut run);
        let pages = written.ok()?;

        self.send(message, Some(claim))?;
        self.named(id, pages, counters);
        counters.blocks.add(pages << PAGE_SHIFT, Relaxed);
        if let Some(block) = MemoryBlock::of(first, MemoryBlock::pages()) {
            // Else it is named once more.
            let _ = named.push(block, GFP_KERNEL);
        }
        Some(Some(pages))
    }
}

impl HostRequests {
    /// Sets the feature up, if it was negotiated.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        let Some(queue) = setup.queues.take(Queue::Request)? else {
            return Ok(None);
        };
        let slot = new_slot!(c"virtio_balloon_rs_requests", setup.tasks)?;
        let inner = Inner::new(setup.dev, queue)?;
        let waker = slot.waker();
        let taker = match setup.settings.memory_blocks() {
            true => {
                let slot_for_blocks = || new_slot!(c"virtio_balloon_rs_discard", setup.tasks);
                let settings = setup.settings.clone();
                Taker::new(
                    slot_for_blocks,
                    setup.dev,
                    settings,
                    MOST_READY,
                    waker.clone(),
                )?
            }
            false => None,
        };
        let requests = try_pin_init!(Self {
            inner <- new_mutex!(inner, "HostRequests::inner"),
            spent: Arc::new(Atomic::new(0), GFP_KERNEL)?,
            waker,
            settings: setup.settings.clone(),
            taker,
            counters <- Counters::new(&setup.dir),
            start: Instant::now(),
        });

        Ok(Some(Arc::pin_init(Task::new(slot, requests), GFP_KERNEL)?))
    }

    /// Returns what a request for memory blocks begins with, if they are taken.
    fn blocks(&self) -> Option<Blocks> {
        Some(Blocks {
            taker: self.taker.clone()?,
            is_begun: false,
        })
    }

    /// Returns how long other tasks have worked for requests since the last call, in nanoseconds.
    fn spent(&self) -> i64 {
        let taking = self.taker.as_ref().map_or(0, |taker| taker.spent());

        self.spent.xchg(0, Relaxed) + taking
    }

    /// Begins to drop `caches`. Returns none while another request does so.
    fn drop_caches(&self, caches: Caches) -> Option<Result<Thread>> {
        let dropping = Dropping::begin()?;
        let spent = self.spent.clone();
        let waker = self.waker.clone();

        Some(Thread::start(c"balloon_rs_drop", waker, move || {
            let start = Instant::<Monotonic>::now();
            let outcome = dropping.drop_caches(caches.pages, caches.slab);

            spent.add(start.elapsed().as_nanos().max(DROPPING), Relaxed);
            outcome
        }))
    }

    /// Does what can be done now. Returns in how many milliseconds to come again, if nothing
    /// happens before.
    fn advance(&self, inner: &mut Inner) -> Option<Msecs> {
        let now = || self.start.elapsed().as_nanos();
        let start = now();
        inner.queue.disable_callback();
        // What the device has used comes back to the guest in any case.
        inner.collect(self);
        inner.budget.spend(self.spent(), start);
        // What has been done is told even so.
        let pause = inner.budget.pause(start);

        let (mut turns, mut waiting) = (0, 0);
        loop {
            if pause.is_none() {
                inner.invite();
            }
            if turns == TURNS_PER_RUN || waiting == inner.open.len() {
                break;
            }
            let Ok(mut open) = inner.open.remove(0) else {
                break;
            };

            let turn = match open.work {
                Work::Skip(_) | Work::Discard(_) | Work::DropCaches(_) if pause.is_some() => {
                    Turn::Wait
                }
                _ => inner.turn(&mut open, self),
            };

            // To the end, where there is room, since it comes from there: the next turn is another
            // one's.
            if !matches!(turn, Turn::Over) {
                let _ = inner.open.push_within_capacity(open);
            }
            match turn {
                Turn::Wait => waiting += 1,
                Turn::Again | Turn::Over => waiting = 0,
            }
            turns += 1;
            inner.collect(self);
        }
        if let Some(taker) = &self.taker {
            // The requests may have been cancelled.
            if taker.is_busy() && !inner.open.iter().any(Open::needs_blocks) {
                taker.cancel();
            }
        }
        inner.queue.kick();
        self.counters.open.store(inner.open.len() as u64, Relaxed);

        let end = now();
        inner.budget.spend(end - start, end);
        if turns == TURNS_PER_RUN || !inner.queue.enable_callback() {
            Some(0)
        } else if let Some(pause) = pause {
            Some(pause.min(timeouts::MISSED_INTERRUPT))
        } else if inner.messages > 0 || !inner.open.is_empty() || inner.inboxes == 0 {
            // Without a buffer for a request, because there was no memory, the device cannot ask.
            Some(timeouts::MISSED_INTERRUPT)
        } else {
            None
        }
    }
}

impl Feature for Task<HostRequests> {
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.schedule();
    }

    fn queue_used(&self, queue: Queue) {
        if queue == Queue::Request {
            self.schedule();
        }
    }

    /// Nothing is open any more after that: caches that are being dropped are left to their thread,
    /// which is killed. On shutdown they do not concern the device.
    fn quiesce(&self, why: Quiesce) -> Result {
        self.stop();
        match (&self.taker, why) {
            (Some(taker), Quiesce::Shutdown) => taker.stop(),
            (None, Quiesce::Shutdown) => (),
            (taker, Quiesce::Reset) => {
                taker.iter().for_each(|taker| taker.leave());
                self.inner.lock().open.clear();
                self.counters.open.store(0, Relaxed);
            }
        }
        Ok(())
    }

    fn reclaim(&self) {
        drop(self.inner.lock().queue.take_back());
    }

    fn restore(&self, dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        let Some(queue) = queues.take(Queue::Request)? else {
            return Ok(());
        };
        let inner = Inner::new(dev, queue)?;
        let before = mem::replace(&mut *self.inner.lock(), inner);

        drop(before);
        self.taker.iter().for_each(|taker| taker.enter());
        self.resume();
        Ok(())
    }
}

impl Job for HostRequests {
    fn run(task: &Task<Self>) {
        let mut inner = task.inner.lock();

        // If the queue is broken, so is the device, and nobody asks any more.
        match task.advance(&mut inner) {
            Some(delay) if !inner.queue.is_broken() => task.schedule_in(delay),
            _ => (),
        }
    }
}

/// Returns why a request was refused, if that is what `status` says.
fn refusal(status: u8) -> Option<&'static str> {
    match status {
        request::UNSUPPORTED => Some("its command is not known"),
        request::MALFORMED => Some("a field has no legal value"),
        request::UNKNOWN_ID => Some("there is nothing to cancel under that id"),
        _ => None,
    }
}

/// Returns a buffer for a message, which never grows.
fn message(flags: kernel::alloc::Flags) -> Result<KVec<u64>> {
    Ok(KVec::with_capacity(page_sets::WORDS_PER_MESSAGE, flags)?)
}

/// Returns how many kernel pages are kept from being used for one message.
fn claim_pages() -> u64 {
    let pages = match memory::is_zeroed_on_allocation() {
        true => ZEROED_CLAIM_PAGES,
        false => CLAIM_PAGES,
    };

    pages.max(1 << memory::page_block_order())
}

/// Returns the walk that `request` asks for, for blocks of 2^`least` pages at least, `blocks` of
/// them at a time.
fn walk(request: &Request, least: u32, blocks: usize) -> Result<Walk> {
    let order = u32::from(request.block_shift).saturating_sub(PAGE_SHIFT as u32);
    let start = u64::from_le(request.start).div_ceil(PAGE_SIZE as u64);
    let end = match u64::from_le(request.end) {
        0 => u64::MAX,
        end => end,
    } >> PAGE_SHIFT;

    Walk::new(start..end, order.max(least), blocks)
}
