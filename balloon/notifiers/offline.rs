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
        notifiers::memory_hotplug::GoingOffline,
        work::{
            poll::within,
            task::Task, //
        }, //
    }, //
};

use core::ops::Range;
use kernel::prelude::*;

impl GoingOffline for Task<Balloon> {
    /// Gives the blocks that lie there back: order-0 pages are moved by the kernel. The balloon
    /// takes others then.
    fn going_offline(&self, pfns: Range<u64>) -> Result {
        let mut worker = self.worker.lock();

        if let Some(offliner) = &self.offliner {
            offliner.cancel();
        }
        // A block may be on its way into the balloon. And the kernel tries over and over to move
        // order-0 pages which cannot be moved: those that the device has not answered for.
        within(timeouts::UNRESPONSIVE, || {
            let answers =
                worker.inflate.collect(&self.pages) + deflate::collect(&self.deflate, &self.pages);
            // The device need not interrupt for an answer that was taken before.
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
        // Nothing more comes of the work, and no page is moved any more.
        if before > 0 && (worker.error.is_some() || self.is_broken(&worker)) {
            return Err(EBUSY);
        }
        let all = deflate::evacuate(&self.deflate, &self.pages, &mut worker.batch, &pfns);
        if self.pages.len() == before {
            return all.then_some(()).ok_or(EBUSY);
        }

        let answered = within(timeouts::UNRESPONSIVE, || {
            deflate::is_answered(&self.deflate, &self.pages).then_some(())
        });
        if answered.is_some() {
            self.queue_used();
        }
        drop(worker);

        self.schedule();
        (all && answered.is_some()).then_some(()).ok_or(EBUSY)
    }
}
