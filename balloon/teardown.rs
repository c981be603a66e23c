// SPDX-License-Identifier: GPL-2.0

//! The teardown of a balloon, before its device is reset or when the system shuts down.

#![forbid(unsafe_code)]

use crate::{
    balloon::state::{
        mib,
        Balloon,
        Worker, //
    },
    device::timeouts,
    rust::{
        mm::node::NodeSet,
        work::{
            poll::poll_timeout,
            task::Task, //
        }, //
    }, //
};

use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// Stops the task, deflates the balloon and notifies the device, for as long as the device makes
/// progress. For when the device is about to be reset.
///
/// Waits at most [`timeouts::TEARDOWN_STALL`] for progress, and until [`timeouts::TEARDOWN`] after
/// `begin` in all. The remaining pages are freed when the balloon is dropped.
///
/// # Errors
///
/// `ETIMEDOUT` if the device did not respond in time.
pub(super) fn quiesce(task: &Task<Balloon>, begin: Instant<Monotonic>) -> Result {
    // The caller does the task's work from here on. While the system suspends, the task would
    // not run.
    task.stop();
    task.quiescing.store(true, Relaxed);
    if let Some(offliner) = &task.offliner {
        offliner.quiesce();
    }

    let mut result = deflate_all(task, begin);

    // The device did not use a report of free pages either.
    if task.worker.lock().inflate.queue.is_reset() {
        result = Err(ETIMEDOUT);
    }
    let _forgotten = task.deflate.lock().forget();
    task.allow_suspend();
    result
}

/// Does the task's work until the balloon is empty and the device has acknowledged all messages.
fn deflate_all(task: &Task<Balloon>, begin: Instant<Monotonic>) -> Result {
    let mut worker = task.worker.lock();
    worker.progress.restart();

    // Work that is possible at once comes before the wait.
    let advance = || loop {
        let was_over = is_over(task, &worker);
        let again = match task.advance(&mut worker) {
            Ok(again) => again,
            Err(_) => return Some(Ok(())),
        };
        let is_over = is_over(task, &worker);

        // A notifier may have emptied the balloon. Then this run has reported that.
        if was_over && is_over {
            return Some(Ok(()));
        }
        if worker.progress.has_stalled(timeouts::TEARDOWN_STALL) {
            return Some(Err(ETIMEDOUT));
        }
        if !is_over && again != Some(0) || begin.elapsed() > timeouts::TEARDOWN {
            return None;
        }
    };
    let left = timeouts::TEARDOWN - begin.elapsed();
    let result = poll_timeout(left, advance).unwrap_or(Err(ETIMEDOUT));

    if result.is_err() {
        dev_warn!(
            task.dev,
            "the device does not respond in time: resetting it with {} MiB in the balloon\n",
            mib(task.pages.len())
        );
    }
    result
}

/// Returns whether the balloon is empty, no notifier deflates it, and the device has used all
/// messages. The last one may be the status.
fn is_over(task: &Task<Balloon>, worker: &Worker) -> bool {
    let is_deflating = || {
        let deflate = task.deflate.lock();
        deflate.is_pending() || deflate.leaving() > 0
    };

    task.pages.len() == 0
        && worker.inflate.queue.in_flight() == 0
        && !task.migrations().is_blocked()
        && !is_deflating()
}

/// Stops all work: the system shuts down.
pub(super) fn shutdown(task: &Task<Balloon>) {
    task.stop();
    if let Some(offliner) = &task.offliner {
        offliner.stop();
    }
}

/// Frees the pages that an unresponsive device has withheld. It was reset, so there is no balloon
/// any more.
pub(super) fn after_reset(balloon: &Balloon) {
    while !balloon
        .pages
        .take(usize::MAX, usize::MAX, &NodeSet::all())
        .is_empty()
    {}

    balloon.worker.lock().inflate.detach_unused();
    balloon.migrations().detach_unused();
    // Dropped after the lock was released, since that may sleep.
    let _before = balloon.deflate.lock().detach_unused();
}
