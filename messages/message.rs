// SPDX-License-Identifier: GPL-2.0

//! Messages that name pages, and the queues that carry them.
//!
//! What a message looks like depends on what was negotiated: [`pfns`] or [`page_sets`]. All else is
//! the same.

#![forbid(unsafe_code)]

use crate::{
    bitmap::Encoding,
    messages::{
        balloon_page::BALLOON_PAGES_PER_PAGE,
        page_sets,
        pfns,
        runs::{
            Runs,
            Sorted, //
        }, //
    },
    rust::{
        mm::{
            pages::{
                batch::Batch,
                page_list::PageList, //
            },
            pfn_range::PfnRange, //
        },
        virtio::{
            ByteOrder,
            Either,
            Virtqueue, //
        },
        virtio_balloon::page_set, //
    }, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*, //
};

/// How many migrations a message names at most: as many pages as fit into one of the base protocol. A
/// page set has room for more.
pub(crate) const MIGRATIONS_PER_MESSAGE: usize = pfns::PFNS_PER_MESSAGE / BALLOON_PAGES_PER_PAGE;

/// How many messages of the base protocol the device has at most. QEMU reads all that there are in
/// one go, under a lock that the guest's CPUs need for their timers.
const PFN_MESSAGES_IN_FLIGHT: usize = 32;

/// How many buffers are kept for messages when there is nothing to tell, so that there is always
/// one to be had when memory is short.
const RESERVE: usize = 4;

/// What pages are named for.
#[derive(Clone, Copy)]
pub(crate) enum Command {
    /// They are in the balloon from now on.
    Inflate,
    /// They are not any more.
    Deflate,
}

impl Command {
    /// Returns what page sets call it. In the base protocol it is the queue that says so.
    fn in_page_set(self) -> u16 {
        match self {
            Self::Inflate => page_set::INFLATE,
            Self::Deflate => page_set::DEFLATE,
        }
    }
}

/// What messages look like.
#[derive(Clone, Copy)]
pub(crate) enum Format {
    /// Arrays of page frame numbers.
    Pfns(ByteOrder),
    /// Page sets, in the encoding that is shorter or in one that was asked for.
    PageSets(Option<Encoding>),
}

impl Format {
    /// Returns how many blocks a message names at least, wherever they lie.
    fn blocks_per_message(self) -> usize {
        match self {
            Self::Pfns(_) => MIGRATIONS_PER_MESSAGE,
            Self::PageSets(_) => page_sets::RUNS_PER_MESSAGE,
        }
    }

    fn allocate(self, flags: kernel::alloc::Flags) -> Result<Message> {
        Ok(match self {
            Self::Pfns(order) => {
                Either::Left((KVec::with_capacity(pfns::PFNS_PER_MESSAGE, flags)?, order))
            }
            Self::PageSets(forced) => Either::Right((
                KVec::with_capacity(page_sets::WORDS_PER_MESSAGE, flags)?,
                forced,
            )),
        })
    }
}

/// A message, with what has to be known to write it. Never grows beyond its capacity: its queue is
/// no place to allocate.
pub(crate) type Message = Either<(KVec<u32>, ByteOrder), (KVec<u64>, Option<Encoding>)>;

impl Message {
    fn write(&mut self, command: Command, runs: &mut impl Runs) -> Result {
        match self {
            Self::Left((array, order)) => pfns::write(array, *order, runs),
            Self::Right((words, forced)) => {
                page_sets::write(words, command.in_page_set(), 0, *forced, runs).map(|_| ())
            }
        }
    }

    fn clear(&mut self) {
        match self {
            Self::Left((array, _)) => array.clear(),
            Self::Right((words, _)) => words.clear(),
        }
    }
}

/// A batch, of which each block goes to a list when it was named.
pub(crate) struct Described<'a> {
    batch: &'a mut Batch,
    pages: PageList,
}

impl Runs for Described<'_> {
    fn first(&mut self) -> Option<PfnRange> {
        self.batch.first()
    }

    fn advance(&mut self, pages: u64) {
        // A block has room in an empty message, and is taken as a whole.
        if pages > 0 {
            self.batch.take_first(&mut self.pages);
        }
    }
}

/// An empty message of a queue.
pub(crate) struct Draft {
    message: Message,
    command: Command,
}

impl Draft {
    /// Writes a message about the first pages in `batch`, as many as it has room for.
    pub(crate) fn write(mut self, batch: &mut Batch) -> Written {
        let mut named = Described {
            batch,
            pages: PageList::new(),
        };
        let result = self.message.write(self.command, &mut named);

        Written {
            message: self.message,
            pages: named.pages,
            result,
        }
    }
}

/// A message about `pages`, unless `result` is an error.
pub(crate) struct Written {
    message: Message,
    pages: PageList,
    result: Result,
}

/// What belongs to a message until the device has used it.
pub(crate) enum Pages<M> {
    /// Pages that are nowhere else.
    List(PageList),
    /// Migrations of pages within the balloon.
    PendingMigrations(KVec<M>),
}

/// What a virtqueue for messages carries.
pub(crate) type Payload<M> = (Message, Pages<M>);

/// A virtqueue for messages, also about migrations of the type `M`.
pub(crate) struct MessageQueue<M> {
    vq: Virtqueue<Payload<M>>,
    format: Format,
    command: Command,
    /// Buffers that are not in use.
    spare: KVec<Message>,
    /// Space to put migrations in order.
    sorted: KVec<u64>,
    /// How many messages the device was not notified of.
    unnotified: usize,
    /// How many messages the device has used since the beginning.
    answered: usize,
}

impl<M> MessageQueue<M> {
    /// Begins with an empty queue.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(vq: Virtqueue<Payload<M>>, format: Format, command: Command) -> Result<Self> {
        let mut spare = KVec::with_capacity(vq.room().max(RESERVE), GFP_KERNEL)?;

        for _ in 0..RESERVE {
            spare.push(format.allocate(GFP_KERNEL)?, GFP_KERNEL)?;
        }

        Ok(Self {
            vq,
            format,
            command,
            spare,
            sorted: KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?,
            unnotified: 0,
            answered: 0,
        })
    }

    /// Returns the number of the device, which is also in its name.
    pub(crate) fn device(&self) -> u32 {
        self.vq.device()
    }

    /// Returns how many more messages can be sent now.
    pub(crate) fn room(&self) -> usize {
        let most = match self.format {
            Format::Pfns(_) => PFN_MESSAGES_IN_FLIGHT,
            Format::PageSets(_) => usize::MAX,
        };

        self.vq.room().min(most.saturating_sub(self.in_flight()))
    }

    /// Returns how many blocks can be named now, wherever they lie. Without page sets each is a
    /// page.
    pub(crate) fn room_for_blocks(&self) -> usize {
        self.room().saturating_mul(self.format.blocks_per_message())
    }

    /// Returns whether messages are page sets.
    pub(crate) fn has_page_sets(&self) -> bool {
        matches!(self.format, Format::PageSets(_))
    }

    /// Returns how many messages the device has not used yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.vq.in_flight()
    }

    /// Writes a message about as many of `runs` as it has room for. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EOVERFLOW` if a page has no name in the protocol.
    pub(crate) fn write(&mut self, runs: &mut impl Runs) -> Result<Message> {
        let mut message = self.empty()?;

        match message.write(self.command, runs) {
            Ok(()) => Ok(message),
            Err(error) => {
                self.keep(message);
                Err(error)
            }
        }
    }

    fn empty(&mut self) -> Result<Message> {
        match self.spare.pop() {
            Some(message) => Ok(message),
            // Not GFP_NOWAIT, for the reason that batches have.
            None => self.format.allocate(__GFP_NOWARN),
        }
    }

    /// Returns a message that can be written without the queue. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn draft(&mut self) -> Result<Draft> {
        Ok(Draft {
            message: self.empty()?,
            command: self.command,
        })
    }

    /// Sends `message`. `pages` belong to it until the device has used it.
    ///
    /// # Errors
    ///
    /// Returns the pages, if the queue is full, broken, or gone.
    pub(crate) fn send(&mut self, message: Message, pages: Pages<M>) -> Result<(), Pages<M>> {
        match self.vq.add((message, pages)) {
            Ok(()) => {
                self.unnotified += 1;
                Ok(())
            }
            Err((message, pages)) => {
                self.keep(message);
                Err(pages)
            }
        }
    }

    /// Sends a message about the first pages in `batch`, as many as it has room for. Returns how
    /// many kernel pages that is.
    ///
    /// # Errors
    ///
    /// Returns the pages that could not be sent, and are in `batch` no more; and why: `EAGAIN` if
    /// there is no room in the queue, or nobody to tell, else as for [`write`](Self::write).
    pub(crate) fn send_some(&mut self, batch: &mut Batch) -> Result<usize, (PageList, Error)> {
        let written = self.draft().map(|draft| draft.write(batch));

        self.send_written(written)
    }

    /// Sends what [`Draft::write`] has returned, with the result of [`send_some`](Self::send_some).
    pub(crate) fn send_written(
        &mut self,
        written: Result<Written>,
    ) -> Result<usize, (PageList, Error)> {
        let Written {
            message,
            pages: list,
            result,
        } = written.map_err(|error| (PageList::new(), error))?;
        if let Err(error) = result {
            self.keep(message);
            return Err((list, error));
        }
        let pages = list.len();

        match self.send(message, Pages::List(list)) {
            Err(Pages::List(list)) => Err((list, EAGAIN)),
            _ => Ok(pages),
        }
    }

    /// Sends a message about one page of each of `migrations`, which is what `pfn` returns.
    ///
    /// # Errors
    ///
    /// Returns the migrations, if there is no room or no memory for a message.
    pub(crate) fn send_migrations(
        &mut self,
        migrations: KVec<M>,
        pfn: impl Fn(&M) -> u64,
    ) -> Result<(), KVec<M>> {
        let mut sorted = core::mem::replace(&mut self.sorted, KVec::new());
        for pfn in migrations.iter().map(pfn) {
            let place = sorted.partition_point(|&this| this < pfn);

            // There is room for as many as can be waiting.
            let _ = sorted.insert_within_capacity(place, pfn);
        }

        let message = self.write(&mut Sorted(&sorted));
        sorted.clear();
        self.sorted = sorted;

        let Ok(message) = message else {
            return Err(migrations);
        };
        match self.send(message, Pages::PendingMigrations(migrations)) {
            Err(Pages::PendingMigrations(migrations)) => Err(migrations),
            _ => Ok(()),
        }
    }

    /// Returns how many messages the device was not notified of.
    pub(crate) fn unnotified(&self) -> usize {
        self.unnotified
    }

    /// Notifies the device of what was sent: once, however much it is.
    pub(crate) fn notify(&mut self) {
        if self.unnotified > 0 {
            self.vq.kick();
            self.unnotified = 0;
        }
    }

    /// Takes back what a device has that was reset. Nothing can be sent any more.
    pub(crate) fn detach_unused(&mut self) -> KVec<Option<Payload<M>>> {
        self.vq.detach_unused()
    }

    /// Returns the pages of the next message that the device has used.
    pub(crate) fn next_used(&mut self) -> Option<Pages<M>> {
        let ((message, pages), _) = self.vq.next_used()?;
        self.answered = self.answered.wrapping_add(1);

        self.keep(message);
        Some(pages)
    }

    /// Returns how many messages the device has used since the beginning, in the task and in notifiers.
    pub(crate) fn answered(&self) -> usize {
        self.answered
    }

    fn keep(&mut self, mut message: Message) {
        message.clear();

        // There is room for as many as there can be messages; if there were not, it would just be
        // freed.
        let _ = self.spare.push_within_capacity(message);
    }

    /// Says that no interrupts are needed until [`sleep`](Self::sleep).
    pub(crate) fn wake(&mut self) {
        self.vq.disable_callback();
    }

    /// Asks to be woken when the device has used most of what it has. Returns false if it has
    /// already.
    #[must_use]
    pub(crate) fn sleep(&mut self) -> bool {
        if self.in_flight() == 0 {
            self.spare.truncate(RESERVE);
        }

        self.vq.enable_callback_delayed()
    }

    /// Returns whether the device was reset.
    pub(crate) fn is_reset(&self) -> bool {
        self.vq.is_reset()
    }

    /// Returns whether the queue will never work again.
    pub(crate) fn is_broken(&self) -> bool {
        self.vq.is_broken()
    }
}
