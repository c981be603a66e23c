// SPDX-License-Identifier: GPL-2.0

//! Compaction moves pages of the balloon out of its way: another page takes the place of each.
//!
//! Compaction is not kept waiting for the device. A move is noted, and the balloon's task tells the
//! device of many at once: first of the pages that are in the balloon now, and when it has
//! answered, of those that are not any more. In between the balloon has pages that the device does
//! not know of, and that may not leave it: the device would learn of such a page's departure first,
//! and then take it from whoever uses it.
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
                OldPage,
                PageRef, //
            },
            pages::page_list::PageList, //
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

/// A page that has taken the place of another one. The numbers are those of kernel pages.
pub(crate) struct Migration {
    pub(super) new: u64,
    pub(super) old: u64,
    /// Keeps the old page from being used before the device has been told, where it insists on
    /// that.
    _kept: Option<PageRef>,
}

/// Migrations that the device has to be notified of.
#[pin_data]
pub(crate) struct PendingMigrations {
    waker: Waker,
    /// How long page migration waits for the old pages to be free.
    timeout: StallTimeout,
    #[pin]
    inner: SpinLock<Inner>,
}

struct Inner {
    terms: Negotiated,
    /// Whether the balloon's task lets pages be moved.
    allowed: bool,
    /// How many [`MigrationGuard`] there are.
    guards: usize,
    /// Moves that the device has not been told of. Never grows beyond its capacity.
    waiting: KVec<Migration>,
    /// The new pages of `waiting`, and those of a message that the device has not used. As many at most, in ascending order.
    waiting_new: KVec<u64>,
    telling: KVec<u64>,
    /// Moves of which the device knows the new pages, if any. `None` while they are part of a
    /// message.
    told: Option<KVec<Migration>>,
}

impl Inner {
    /// Returns whether the device may not know yet that the page `pfn` is in the balloon.
    fn is_new(&self, pfn: u64) -> bool {
        let is_in = |pfns: &[u64]| pfns.binary_search(&pfn).is_ok();

        is_in(&self.telling) || is_in(&self.waiting_new)
    }

    fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.told.as_ref().is_some_and(|told| told.is_empty())
    }
}

/// As long as it exists, no page is moved.
pub(crate) struct MigrationGuard<'a>(&'a PendingMigrations);

impl MigrationGuard<'_> {
    /// Takes those pages off `pages` of which the device may not know yet that they are in the
    /// balloon, and puts them on `unknown`.
    pub(crate) fn split_off_unacknowledged(&self, pages: &mut PageList, unknown: &mut PageList) {
        let inner = self.0.inner.lock();

        if !inner.telling.is_empty() || !inner.waiting.is_empty() {
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
    /// Returns an initialiser for a balloon whose task `waker` schedules. No page is moved before
    /// that [allows](Self::allow) it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(waker: Waker, terms: Negotiated) -> Result<impl PinInit<Self, Error>> {
        let waiting = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let waiting_new = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let telling = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let told = Some(KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?);

        Ok(try_pin_init!(Self {
            waker,
            timeout: StallTimeout::new(timeouts::MIGRATION),
            inner <- new_spinlock!(
                Inner {
                    terms,
                    allowed: false,
                    guards: 0,
                    waiting,
                    waiting_new,
                    telling,
                    told,
                },
                "PendingMigrations::inner"
            ),
        }))
    }

    /// Forgets what a device that was reset has not been told, and lets no page be moved before the
    /// [`reset`](Self::reset) for the next one.
    pub(crate) fn detach_unused(&self) {
        let mut inner = self.inner.lock();

        inner.telling.clear();
        inner.waiting_new.clear();
        // Dropped when the lock has been released. Without capacity there is no room for a migration.
        let _waiting = mem::take(&mut inner.waiting);
        let _told = inner.told.replace(KVec::new());
        drop(inner);
    }

    /// Begins anew with a device that was reset.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn reset(&self, terms: Negotiated) -> Result {
        let mut waiting = KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?;
        let mut told = Some(KVec::with_capacity(MIGRATIONS_PER_MESSAGE, GFP_KERNEL)?);
        let mut inner = self.inner.lock();

        inner.terms = terms;
        inner.telling.clear();
        inner.waiting_new.clear();
        // What was there is freed without the lock.
        mem::swap(&mut inner.waiting, &mut waiting);
        mem::swap(&mut inner.told, &mut told);
        drop(inner);
        Ok(())
    }

    /// Allows or forbids migrations. They are forbidden while the balloon changes its size, so that it
    /// gets there: compaction comes back.
    pub(crate) fn allow(&self, allowed: bool) {
        self.inner.lock().allowed = allowed;
    }

    /// Keeps all pages where they are, for as long as the result exists.
    pub(crate) fn block(&self) -> MigrationGuard<'_> {
        self.inner.lock().guards += 1;
        MigrationGuard(self)
    }

    /// Returns whether the device knows of all pages in the balloon now.
    pub(crate) fn is_settled(&self) -> bool {
        self.inner.lock().is_settled()
    }

    /// Reports the new pages of the migrations that wait, by `send`, unless the device has not
    /// acknowledged all of the last ones. `send` returns the migrations if it could not.
    pub(super) fn report_new(
        &self,
        send: impl FnOnce(KVec<Migration>) -> core::result::Result<(), KVec<Migration>>,
    ) -> bool {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;

        if inner.waiting.is_empty() {
            return false;
        }
        let Some(told) = inner.told.take_if(|told| told.is_empty()) else {
            return false;
        };
        let waiting = mem::replace(&mut inner.waiting, told);

        // No message is in flight.
        mem::swap(&mut inner.waiting_new, &mut inner.telling);
        if let Err(waiting) = send(waiting) {
            inner.told = Some(mem::replace(&mut inner.waiting, waiting));
            mem::swap(&mut inner.waiting_new, &mut inner.telling);
            return false;
        }
        true
    }

    /// Reports the old pages of the migrations whose new pages the device knows, by `send`. Returns
    /// whether that was done.
    pub(super) fn report_old(
        &self,
        send: impl FnOnce(KVec<Migration>) -> core::result::Result<(), KVec<Migration>>,
    ) -> bool {
        let Some(migrations) = self.inner.lock().told.take_if(|told| !told.is_empty()) else {
            return false;
        };

        match send(migrations) {
            Ok(()) => true,
            Err(migrations) => {
                self.inner.lock().told = Some(migrations);
                false
            }
        }
    }

    /// The device knows the new pages of `migrations`.
    pub(crate) fn acknowledged_new(&self, migrations: KVec<Migration>) {
        let mut inner = self.inner.lock();

        inner.telling.clear();
        inner.told = Some(migrations);
    }

    /// The device knows that the old pages of `migrations` have left the balloon.
    pub(crate) fn acknowledged_old(&self, mut migrations: KVec<Migration>) {
        migrations.clear();
        self.inner.lock().told = Some(migrations);
        self.timeout.progress();
    }
}

impl MigratePage for PendingMigrations {
    const END_TIMEOUT: Delta = timeouts::MIGRATION_AT_END;

    fn replace(&self, old: &OldPage<'_>, new: u64, may_sleep: bool) -> Result {
        // The kernel checks whether an isolated pageblock is free as soon as its last page has moved.
        let is_last = old.is_last_of_isolated();
        let mut inner = self.inner.lock();

        // A page that the protocol cannot name is no use in the balloon.
        if !inner.terms.can_describe(new) {
            return Err(EOVERFLOW);
        }

        // The device must know of the old page's arrival before the page leaves, and of the new
        // page's departure, if it has been in the balloon before, before that comes again.
        let is_awaited = is_last && inner.terms.notify_first();
        if !inner.allowed
            || is_awaited && !may_sleep
            || inner.guards > 0
            || inner.is_new(old.pfn())
            || inner.waiting.iter().any(|this| this.old == new)
        {
            return Err(EAGAIN);
        }

        let this = Migration {
            new,
            old: old.pfn(),
            _kept: inner.terms.notify_first().then(|| old.keep()),
        };
        let first = inner.waiting.is_empty();
        let result = inner.waiting.push_within_capacity(this).map_err(|_| EAGAIN);
        if result.is_ok() {
            let place = inner.waiting_new.partition_point(|&pfn| pfn < new);

            // There is room for as many as can be waiting.
            let _ = inner.waiting_new.insert_within_capacity(place, new);
        }
        drop(inner);

        if first {
            self.waker.schedule();
        }
        if result.is_ok() && is_awaited {
            self.timeout.poll(|| self.is_settled().then_some(()));
        } else if result.is_err() && may_sleep {
            // Compaction gives up after some tries, which take less time than the device's answer.
            fsleep(timeouts::MIGRATION_RETRY);
        }

        result
    }
}
