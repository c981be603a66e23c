// SPDX-License-Identifier: GPL-2.0

//! Letting the kernel take memory offline: it migrates the balloon's pages.

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
            poll::poll_timeout,
            task::Task, //
        }, //
    }, //
};

use kernel::prelude::*;

impl GoingOffline for Task<Balloon> {
    /// Waits until the device has acknowledged all messages, so that the kernel can migrate all of
    /// the balloon there.
    fn going_offline(&self) -> Result {
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

        // The task has ended, and no page is migrated any more.
        let has_ended = worker.error.is_some() || self.is_broken(&worker);
        match has_ended && self.pages.len() > 0 {
            true => Err(EBUSY),
            false => Ok(()),
        }
    }
}
