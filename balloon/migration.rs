// SPDX-License-Identifier: GPL-2.0

//! Page migration: the kernel replaces pages of the balloon by other pages, to compact memory, for
//! contiguous allocations, or before memory goes offline.
//!
//! Page migration does not wait for the device. The driver records a migration, and the balloon's
//! task reports many at once: first the new pages and, when the device has used that message, the
//! old ones. Until then the device does not know the new pages, so they must not leave the balloon.
//! Otherwise the device would see the deflate of such a page before its inflate, and discard the
//! data of the page's next user.
//!
//! A block whose memory the kernel needs leaves the balloon without a replacement. It is recorded
//! in the same way, and the balloon then inflates elsewhere.
//!
//! Specification: clause 5.5.6.1, Driver Requirements: Device Operation.

#![forbid(unsafe_code)]

use crate::{
    device::timeouts,
    messages::{
        message::MIGRATIONS_PER_MESSAGE,
        negotiated::Negotiated, //
    },
    rust::{
        mm::{
            balloon::replace::{
                MigratePage,
                OldBlock,
                OldPage,
                PageRef,
                TakenBlock, //
            },
            pages::page_list::PageList,
            pfn_range::PfnRange, //
        },
        work::{
            poll::StallTimeout,
            task::Waker, //
        }, //
    }, //
};

use core::mem;
use kernel::{
    new_spinlock,
    prelude::*,
    sync::SpinLock,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// A page that has replaced another one, or a block that has left the balloon. The numbers are
/// those of kernel pages.
pub(crate) struct Migration {
    pub(super) new: Option<PfnRange>,
    pub(super) old: PfnRange,
    /// Keeps the old page from being reused before the device has been notified, if it requires
    /// that.
    _kept: Option<PageRef>,
    /// The block, which is free when this is dropped.
    _block: Option<TakenBlock>,
}

impl Migration {
    /// Returns how many pages (kernel pages) have left the balloon.
    pub(super) fn vacated(&self) -> usize {
        match self.new {
            Some(_) => 0,
            None => self.old.len() as usize,
        }
    }
}

/// Migrations that the device has to be notified of.
#[pin_data]
pub(crate) struct PendingMigrations {
    /// How long page migration waits for the old pages to be free.
    timeout: StallTimeout,
    #[pin]
    inner: SpinLock<Inner>,
}

struct Inner {
    /// Schedules the balloon's task, until the balloon ends.
    waker: Option<Waker>,
    terms: Negotiated,
    /// Whether the balloon's task allows page migration.
    allowed: bool,
    /// How many [`MigrationGuard`] there are.
    guards: usize,
    /// Migrations that were not reported to the device. Never grows beyond its capacity.
    waiting: KVec<Migration>,
    /// The new pages of `waiting`, or those of a message that the device has not used, in ascending
    /// order.
    waiting_new: KVec<u64>,
    reporting: KVec<u64>,
    /// Migrations whose new pages the device knows, if any. `None` while they are part of a
    /// message.
    acked: Option<KVec<Migration>>,
    /// The pages of blocks that have left the balloon, and are not free.
    leaving: usize,
}

impl Inner {
    /// Returns whether the device may not know yet that the page `pfn` is in the balloon.
    fn is_new(&self, pfn: u64) -> bool {
        let is_in = |pfns: &[u64]| pfns.binary_search(&pfn).is_ok();

        is_in(&self.reporting) || is_in(&self.waiting_new)
    }

    fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.acked.as_ref().is_some_and(|acked| acked.is_empty())
    }

    /// Returns whether pages may leave the balloon.
    fn may_leave(&self) -> bool {
        self.allowed && self.guards == 0
    }

    /// Records a migration, and schedules the balloon's task if it is the first one.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if too many are unreported.
    fn record(&mut self, migration: Migration) -> Result {
        let first = self.waiting.is_empty();

        self.waiting
            .push_within_capacity(migration)
            .map_err(|_| EAGAIN)?;
        if let Some(waker) = self.waker.as_ref().filter(|_| first) {
            waker.schedule();
        }
        Ok(())
    }
}

/// As long as it exists, no page is migrated.
pub(crate) struct MigrationGuard<'a>(&'a PendingMigrations);

impl MigrationGuard<'_> {
    /// Moves the pages that the device may not know yet from `pages` to `unknown`.
    pub(crate) fn split_off_unacknowledged(&self, pages: &mut PageList, unknown: &mut PageList) {
        let inner = self.0.inner.lock();

        if !inner.reporting.is_empty() || !inner.waiting.is_empty() {
            pages.move_base_pages(unknown, |pfn| inner.is_new(pfn));
        }
    }
}

impl Drop for MigrationGuard<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().guards -= 1;
    }
}

impl PendingMigrations {
    /// Returns an initialiser for a balloon whose task `waker` schedules. Page migration is refused
    /// until the task [allows](Self::allow) it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(waker: Waker, terms: Negotiated) -> Result<impl PinInit<Self, Error>> {
        let waiting = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let waiting_new = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let reporting = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let acked = Some(KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?);

        Ok(try_pin_init!(Self {
            timeout: StallTimeout::new(timeouts::MIGRATION),
            inner <- new_spinlock!(
                Inner {
                    waker: Some(waker),
                    terms,
                    allowed: false,
                    guards: 0,
                    waiting,
                    waiting_new,
                    reporting,
                    acked,
                    leaving: 0,
                },
                "PendingMigrations::inner"
            ),
        }))
    }

    /// Discards the migrations that a reset device has not seen, and refuses page migration until
    /// [`reset`](Self::reset).
    pub(crate) fn detach_unused(&self) {
        let mut inner = self.inner.lock();

        inner.reporting.clear();
        inner.waiting_new.clear();
        inner.leaving = 0;
        // Dropped after the lock was released. Without capacity there is no room for a migration.
        let _waiting = mem::take(&mut inner.waiting);
        let _acked = inner.acked.replace(KVec::new());
        drop(inner);
    }

    /// Starts again with a device that was reset.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn reset(&self, terms: Negotiated) -> Result {
        let mut waiting = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let mut acked = Some(KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?);
        let mut inner = self.inner.lock();

        inner.terms = terms;
        inner.reporting.clear();
        inner.waiting_new.clear();
        inner.leaving = 0;
        // The old content is freed without the lock.
        mem::swap(&mut inner.waiting, &mut waiting);
        mem::swap(&mut inner.acked, &mut acked);
        drop(inner);
        Ok(())
    }

    /// Allows or refuses migrations. The task refuses them while the balloon changes its size, so
    /// that it reaches the target: page migration retries.
    pub(crate) fn allow(&self, allowed: bool) {
        self.inner.lock().allowed = allowed;
    }

    /// Refuses page migration for as long as the result exists.
    pub(crate) fn block(&self) -> MigrationGuard<'_> {
        self.inner.lock().guards += 1;
        MigrationGuard(self)
    }

    /// Returns whether there is such a result.
    pub(crate) fn is_blocked(&self) -> bool {
        self.inner.lock().guards > 0
    }

    /// Returns whether the device knows of all pages in the balloon now.
    pub(crate) fn is_settled(&self) -> bool {
        self.inner.lock().is_settled()
    }

    /// Returns how many kernel pages of blocks are neither in the balloon nor free.
    pub(crate) fn leaving(&self) -> usize {
        self.inner.lock().leaving
    }

    /// Reports the new pages of the waiting migrations by `send`, if the device has acknowledged
    /// all of the previous ones. `send` returns the migrations if it fails.
    pub(super) fn report_new(
        &self,
        send: impl FnOnce(KVec<Migration>) -> core::result::Result<(), KVec<Migration>>,
    ) -> bool {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;

        if inner.waiting.is_empty() {
            return false;
        }
        let Some(acked) = inner.acked.take_if(|acked| acked.is_empty()) else {
            return false;
        };
        let waiting = mem::replace(&mut inner.waiting, acked);
        // The device knows all new pages if there are none.
        if waiting.iter().all(|this| this.new.is_none()) {
            inner.acked = Some(waiting);
            return false;
        }

        // No message is in flight.
        mem::swap(&mut inner.waiting_new, &mut inner.reporting);
        if let Err(waiting) = send(waiting) {
            inner.acked = Some(mem::replace(&mut inner.waiting, waiting));
            mem::swap(&mut inner.waiting_new, &mut inner.reporting);
            return false;
        }
        true
    }

    /// Reports by `send` the old pages of the migrations whose new pages the device knows. Returns
    /// whether it did.
    pub(super) fn report_old(
        &self,
        send: impl FnOnce(KVec<Migration>) -> core::result::Result<(), KVec<Migration>>,
    ) -> bool {
        let Some(migrations) = self.inner.lock().acked.take_if(|acked| !acked.is_empty()) else {
            return false;
        };

        match send(migrations) {
            Ok(()) => true,
            Err(migrations) => {
                self.inner.lock().acked = Some(migrations);
                false
            }
        }
    }

    /// The device knows the new pages of `migrations`.
    pub(crate) fn acknowledged_new(&self, migrations: KVec<Migration>) {
        let mut inner = self.inner.lock();

        inner.reporting.clear();
        inner.acked = Some(migrations);
    }

    /// The device knows that the old pages of `migrations` have left the balloon.
    pub(crate) fn acknowledged_old(&self, mut migrations: KVec<Migration>) {
        let freed: usize = migrations.iter().map(Migration::vacated).sum();

        migrations.clear();
        let mut inner = self.inner.lock();
        // The device may have been reset since the caller took the message.
        inner.leaving = inner.leaving.saturating_sub(freed);
        inner.acked = Some(migrations);
        drop(inner);
        self.timeout.progress();
    }
}

impl MigratePage for PendingMigrations {
    const END_TIMEOUT: Delta = timeouts::MIGRATION_AT_END;

    fn replace(&self, old: &OldPage<'_>, new: u64, may_sleep: bool) -> Result {
        // The kernel checks whether an isolated pageblock is free as soon as its last page was
        // migrated.
        let is_last = old.is_last_of_isolated();
        let mut inner = self.inner.lock();

        // A page that has no number in the protocol cannot be in the balloon.
        let range = PfnRange::new(new, 1).filter(|_| inner.terms.can_describe(new));
        let (new_range, old_range) = (range.ok_or(EOVERFLOW)?, old.pfns().ok_or(EOVERFLOW)?);

        // The device must see the inflate of the old page before its deflate. If the new page was
        // in the balloon before, the device must see its deflate before its next inflate.
        let is_awaited = is_last && inner.terms.notify_first();
        if !inner.may_leave()
            || is_awaited && !may_sleep
            || inner.is_new(old.pfn())
            || inner.waiting.iter().any(|this| this.old == new_range)
        {
            return Err(EAGAIN);
        }

        let this = Migration {
            new: Some(new_range),
            old: old_range,
            _kept: inner.terms.notify_first().then(|| old.keep()),
            _block: None,
        };
        let result = inner.record(this);
        if result.is_ok() {
            let place = inner.waiting_new.partition_point(|&pfn| pfn < new);

            // There is room for the maximum number of waiting migrations.
            let _ = inner.waiting_new.insert_within_capacity(place, new);
        }
        drop(inner);

        if result.is_ok() && is_awaited {
            self.timeout.poll(|| self.is_settled().then_some(()));
        } else if result.is_err() && may_sleep {
            // Page migration gives up after some attempts, which take less time than the device's
            // answer.
            fsleep(timeouts::MIGRATION_RETRY);
        }

        result
    }

    fn vacate(&self, block: &mut OldBlock<'_>) {
        let mut inner = self.inner.lock();
        let may_leave = inner.may_leave() && inner.waiting.len() < inner.waiting.capacity();
        let taken = may_leave.then(|| block.take()).flatten();
        let has_left = taken.is_some();

        if let Some((old, block)) = taken {
            inner.leaving += old.len() as usize;
            // There is room.
            let _ = inner.record(Migration {
                new: None,
                old,
                _kept: None,
                _block: Some(block),
            });
        }
        drop(inner);

        if has_left {
            // The kernel's caller then checks whether the memory is free.
            self.timeout.poll(|| self.is_settled().then_some(()));
        } else {
            fsleep(timeouts::MIGRATION_RETRY);
        }
    }

    /// Releases the workqueue of the balloon's task: no other one may have its name.
    fn end(&self) {
        // Dropped after the lock was released, since that may sleep.
        let _waker = self.inner.lock().waker.take();
    }
}
