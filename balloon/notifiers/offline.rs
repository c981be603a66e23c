// SPDX-License-Identifier: GPL-2.0

//! Vacating memory that is taken offline.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        queues::{
            deflate,
            migration_reports, //
        },
        state::Balloon, //
    },
    device::timeouts,
    rust::{
        mm::pfn_range::PfnRange,
        notifiers::memory_hotplug::GoingOffline,
        work::{
            poll::poll_timeout,
            task::Task, //
        }, //
    }, //
};

use kernel::prelude::*;

impl GoingOffline for Task<Balloon> {
    /// Deflates the blocks that lie there; the kernel migrates order-0 pages. The balloon then
    /// inflates elsewhere.
    fn going_offline(&self, pfns: PfnRange) -> Result {
        let mut worker = self.worker.lock();

        if let Some(offliner) = &self.offliner {
            offliner.cancel();
        }
        // A block may be in flight to the balloon. And the kernel retries without end to migrate
        // order-0 pages that cannot be migrated: those that the device has not acknowledged.
        poll_timeout(timeouts::GOING_OFFLINE, || {
            let answers =
                worker.inflate.collect(&self.pages) + deflate::collect(&self.deflate, &self.pages);
            // The device need not interrupt for a buffer that was taken before.
            if answers > 0 {
                self.queue_used();
            }
            deflate::send_backlog(&self.deflate);
            migration_reports::send(self.migrations(), &mut worker.inflate, &self.deflate);
            (worker.inflate.in_flight() == 0
                && !self.deflate.lock().is_pending()
                && self.migrations().is_settled())
            .then_some(())
        })
        .ok_or(EBUSY)?;

        let before = self.pages.len();
        // The task has ended, and no page is migrated any more.
        if before > 0 && (worker.error.is_some() || self.is_broken(&worker)) {
            return Err(EBUSY);
        }
        let all = deflate::vacate(&self.deflate, &self.pages, &mut worker.batch, pfns);
        if self.pages.len() == before {
            return all.then_some(()).ok_or(EBUSY);
        }

        let acknowledged = poll_timeout(timeouts::GOING_OFFLINE, || {
            deflate::is_acknowledged(&self.deflate, &self.pages).then_some(())
        });
        if acknowledged.is_some() {
            self.queue_used();
        }
        drop(worker);

        self.schedule();
        (all && acknowledged.is_some()).then_some(()).ok_or(EBUSY)
    }
}
