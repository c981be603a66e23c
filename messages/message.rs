// SPDX-License-Identifier: GPL-2.0

//! Messages that list pages, and their queues.
//!
//! The format of a message depends on the negotiated features: [`pfns`] or [`page_sets`]. All other
//! code is the same.

#![forbid(unsafe_code)]

use crate::{
    bitmap::Encodings,
    messages::{
        balloon_page::BALLOON_PAGES_PER_PAGE,
        page_sets,
        pfns,
        ranges::{
            Ranges,
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
            self,
            ByteOrder,
            Either,
            Virtqueue, //
        },
        virtio_balloon::{
            page_set,
            Status,
            F_PAGE_SETS, //
        }, //
    }, //
};

use kernel::{
    alloc::flags::__GFP_NOWARN,
    device::Core,
    prelude::*, //
};

/// The maximum number of migrations in a message: as many pages as fit into one of the base
/// protocol. A page set has room for more.
pub(crate) const MIGRATIONS_PER_MESSAGE: usize = pfns::PFNS_PER_MESSAGE / BALLOON_PAGES_PER_PAGE;

/// How many buffers for messages are kept in reserve, for when memory is short.
const RESERVE: usize = 4;

/// The purpose of a message.
#[derive(Clone, Copy)]
pub(crate) enum Command {
    /// Inflate.
    Inflate,
    /// Deflate.
    Deflate,
}

impl Command {
    /// Returns the command of page sets. In the base protocol the queue determines it.
    fn in_page_set(self) -> u16 {
        match self {
            Self::Inflate => page_set::INFLATE,
            Self::Deflate => page_set::DEFLATE,
        }
    }
}

/// The format of messages.
#[derive(Clone, Copy)]
pub(crate) enum Format {
    /// Arrays of page frame numbers.
    Pfns(ByteOrder),
    /// Page sets, in the shortest of these encodings.
    PageSets(Encodings),
}

impl Format {
    /// Returns the format that was negotiated with `dev`. Page sets have only the encodings
    /// `requested`, as far as the device accepts them.
    pub(crate) fn of(dev: &virtio::Device<Core<'_>>, requested: Encodings) -> Self {
        match dev.has_feature(F_PAGE_SETS) {
            true => Self::PageSets(
                page_sets::encodings(dev).filter(|encoding| requested.contains(encoding)),
            ),
            false => Self::Pfns(dev.byte_order()),
        }
    }

    /// Returns how many blocks a message has room for at least, wherever they lie.
    fn blocks_per_message(self) -> usize {
        match self {
            Self::Pfns(_) => MIGRATIONS_PER_MESSAGE,
            Self::PageSets(_) => page_sets::RANGES_PER_MESSAGE,
        }
    }

    /// Returns how many messages may be in flight, and how many share one notification.
    fn limits(self) -> (usize, usize) {
        match self {
            Self::Pfns(_) => (pfns::MESSAGES_IN_FLIGHT, pfns::MESSAGES_PER_NOTIFICATION),
            Self::PageSets(_) => (usize::MAX, page_sets::MESSAGES_PER_NOTIFICATION),
        }
    }

    fn allocate(self, flags: kernel::alloc::Flags) -> Result<Message> {
        Ok(match self {
            Self::Pfns(order) => {
                Either::Left((KVec::with_capacity(pfns::PFNS_PER_MESSAGE, flags)?, order))
            }
            Self::PageSets(allowed) => Either::Right((
                KVec::with_capacity(page_sets::WORDS_PER_MESSAGE, flags)?,
                allowed,
            )),
        })
    }
}

/// A message, with its format. Never grows beyond its capacity: an allocation under its queue's
/// lock must not sleep.
pub(crate) type Message = Either<(KVec<u32>, ByteOrder), (KVec<u64>, Encodings)>;

impl Message {
    fn write(&mut self, command: Command, ranges: &mut impl Ranges) -> Result {
        match self {
            Self::Left((array, order)) => pfns::write(array, *order, ranges),
            Self::Right((words, allowed)) => {
                page_sets::write(words, command.in_page_set(), 0, *allowed, ranges).map(|_| ())
            }
        }
    }

    fn write_status(&mut self, status: &Status) -> Result {
        let Self::Right((words, _)) = self else {
            return Err(EINVAL);
        };

        words.resize(size_of::<Status>() / page_sets::WORD, 0, GFP_NOWAIT)?;
        page_sets::put(words, status);
        Ok(())
    }

    fn clear(&mut self) {
        match self {
            Self::Left((array, _)) => array.clear(),
            Self::Right((words, _)) => words.clear(),
        }
    }
}

/// A batch whose blocks move to a list when they are written to a message.
pub(crate) struct Described<'a> {
    batch: &'a mut Batch,
    pages: PageList,
}

impl Ranges for Described<'_> {
    fn first(&mut self) -> Option<PfnRange> {
        self.batch.first()
    }

    fn advance(&mut self, pages: u64) {
        // A block always fits into an empty message, and is taken as a whole.
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
        let mut described = Described {
            batch,
            pages: PageList::new(),
        };
        let result = self.message.write(self.command, &mut described);

        Written {
            message: self.message,
            pages: described.pages,
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

/// The memory that a message owns until the device has used it.
pub(crate) enum Pages<M> {
    /// Pages.
    List(PageList),
    /// Migrations of pages within the balloon.
    Migrations(KVec<M>),
}

/// A buffer of a virtqueue for messages.
pub(crate) type Payload<M> = (Message, Pages<M>);

/// A virtqueue for messages, also about migrations of the type `M`.
pub(crate) struct MessageQueue<M> {
    vq: Virtqueue<Payload<M>>,
    format: Format,
    command: Command,
    /// Buffers that are not in use.
    spare: KVec<Message>,
    /// Space to sort migrations.
    sorted: KVec<PfnRange>,
    /// How many messages were sent without a notification.
    unnotified: usize,
    /// How many messages the device has used since the beginning.
    used: usize,
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
            used: 0,
        })
    }

    /// Returns the number of the device, which is also in its name.
    pub(crate) fn device(&self) -> u32 {
        self.vq.device()
    }

    /// Returns how many more messages can be sent now.
    pub(crate) fn room(&self) -> usize {
        let (most, _) = self.format.limits();

        self.vq.room().min(most.saturating_sub(self.in_flight()))
    }

    /// Returns how many blocks can be sent now, wherever they lie. Without page sets each is a
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

    /// Writes a message about as many of `ranges` as it has room for. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EOVERFLOW` if a page has no number in the protocol.
    pub(crate) fn write(&mut self, ranges: &mut impl Ranges) -> Result<Message> {
        let mut message = self.empty()?;

        match message.write(self.command, ranges) {
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
            // Not GFP_NOWAIT, for the same reason as in batches.
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

    /// Sends `message`. It owns `pages` until the device has used it.
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
    /// Returns the pages that could not be sent, and are no longer in `batch`, with the error:
    /// `EAGAIN` if the queue is full or the device gone, otherwise as for [`write`](Self::write).
    pub(crate) fn send_some(&mut self, batch: &mut Batch) -> Result<usize, (PageList, Error)> {
        let written = self.draft().map(|draft| draft.write(batch));

        self.send_written(written)
    }

    /// Sends the result of [`Draft::write`]. Returns the same as [`send_some`](Self::send_some).
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

    /// Sends a message with the balloon's status.
    ///
    /// # Errors
    ///
    /// `EINVAL` if messages are no page sets, `ENOMEM`, or `EAGAIN` if the queue is full or the
    /// device gone.
    pub(crate) fn send_status(&mut self, status: &Status) -> Result {
        let mut message = self.empty()?;

        if let Err(error) = message.write_status(status) {
            self.keep(message);
            return Err(error);
        }
        self.send(message, Pages::List(PageList::new()))
            .map_err(|_| EAGAIN)
    }

    /// Sends a message about the pages that `pfns` returns for each of `migrations`.
    ///
    /// # Errors
    ///
    /// Returns the migrations, if there is no room or no memory for a message.
    pub(crate) fn send_migrations(
        &mut self,
        migrations: KVec<M>,
        pfns: impl Fn(&M) -> Option<PfnRange>,
    ) -> Result<(), KVec<M>> {
        let mut sorted = core::mem::replace(&mut self.sorted, KVec::new());
        for range in migrations.iter().filter_map(pfns) {
            let place = sorted.partition_point(|this: &PfnRange| this.first() < range.first());

            // There is room for the maximum number of waiting migrations.
            let _ = sorted.insert_within_capacity(place, range);
        }

        let message = self.write(&mut Sorted::new(&sorted));
        sorted.clear();
        self.sorted = sorted;

        let Ok(message) = message else {
            return Err(migrations);
        };
        match self.send(message, Pages::Migrations(migrations)) {
            Err(Pages::Migrations(migrations)) => Err(migrations),
            _ => Ok(()),
        }
    }

    /// Returns whether the device should be notified before more messages are written.
    pub(crate) fn is_notification_due(&self) -> bool {
        let (_, enough) = self.format.limits();

        self.unnotified >= enough
    }

    /// Notifies the device once of all sent messages.
    pub(crate) fn notify(&mut self) {
        if self.unnotified > 0 {
            self.vq.kick();
            self.unnotified = 0;
        }
    }

    /// Takes back the buffers of a device that was reset. The queue refuses messages from then on.
    pub(crate) fn detach_unused(&mut self) -> KVec<Option<Payload<M>>> {
        self.vq.detach_unused()
    }

    /// Returns the pages of the next message that the device has used.
    pub(crate) fn next_used(&mut self) -> Option<Pages<M>> {
        let ((message, pages), _) = self.vq.next_used()?;
        self.used = self.used.wrapping_add(1);

        self.keep(message);
        Some(pages)
    }

    /// Returns how many messages the device has used since the beginning, in the task and in
    /// notifiers.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    fn keep(&mut self, mut message: Message) {
        message.clear();

        // There is room for the maximum number of messages. Otherwise the buffer would just be
        // freed.
        let _ = self.spare.push_within_capacity(message);
    }

    /// Disables interrupts until
    /// [`enable_callback_delayed`](Self::enable_callback_delayed).
    pub(crate) fn disable_callback(&mut self) {
        self.vq.disable_callback();
    }

    /// Requests an interrupt when the device has used most buffers in flight. Returns false if it
    /// has already.
    #[must_use]
    pub(crate) fn enable_callback_delayed(&mut self) -> bool {
        self.vq.enable_callback_delayed()
    }

    /// Takes out a buffer beyond the reserve, if no message is in flight. The caller may free it
    /// without the lock of the queue.
    pub(crate) fn take_surplus(&mut self) -> Option<Message> {
        if self.in_flight() > 0 || self.spare.len() <= RESERVE {
            return None;
        }

        self.spare.pop()
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
