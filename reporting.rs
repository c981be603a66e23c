// SPDX-License-Identifier: GPL-2.0

//! Free page reporting: the host learns which memory is free, and need not keep what is in it.
//!
//! The kernel's page reporting finds free pages from time to time, and sets them aside until the
//! host has answered. It serves one device; others go without.
//!
//! A host that does not answer owns the pages of one report until it is reset. Nothing else waits
//! for them, but the kernel does not suspend in the meantime.
//!
//! Specification: clause 5.5.6.7, Free Page Reporting.

#![forbid(unsafe_code)]

use crate::{
    rust::{
        page_reporting::{
            FreePages,
            Loan,
            Report,
            Reporter, //
        },
        virtqueue::Virtqueue,
        wait::{
            new_wait_queue,
            WaitQueue, //
        },
    },
    virtio, //
};

use kernel::{
    debugfs,
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SetOnce, //
    }, //
};

/// A virtqueue for reports.
pub(crate) type ReportingQueue = Virtqueue<Loan>;

/// What reports go through.
#[pin_data]
struct Reports {
    #[pin]
    queue: Mutex<ReportingQueue>,
    #[pin]
    answered: WaitQueue,
    /// How much was reported, in bytes.
    #[pin]
    reported: debugfs::File<Atomic<u64>>,
}

impl Report for Reports {
    fn report(&self, pages: FreePages<'_>) -> Result {
        self.queue.lock().lend(&pages, &self.answered)?;
        self.reported.add(pages.bytes(), Relaxed);
        Ok(())
    }
}

/// Free page reporting of a device.
///
/// It has to be dropped after the device was reset, since a device that does not answer keeps a
/// report until then.
pub(crate) struct Reporting {
    registered: SetOnce<Pin<KBox<Reporter<Reports>>>>,
    reports: Arc<Reports>,
}

impl Reporting {
    /// Sets all up. The counters are to be seen in `dir`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(queue: ReportingQueue, dir: &debugfs::Dir) -> Result<Self> {
        let reports = try_pin_init!(Reports {
            queue <- new_mutex!(queue, "Reporting::queue"),
            answered <- new_wait_queue!("Reporting::answered"),
            reported <- dir.read_only_file(c"reported_bytes", Atomic::new(0)),
        });

        Ok(Self {
            registered: SetOnce::new(),
            reports: Arc::pin_init(reports, GFP_KERNEL)?,
        })
    }

    /// Begins, unless it has begun before. The device must be ready.
    pub(crate) fn start(&self, dev: &virtio::Device<Core<'_>>) {
        if self.registered.as_ref().is_some() {
            return;
        }

        let capacity = self.reports.queue.lock().room();
        match KBox::pin_init(Reporter::new(self.reports.clone(), capacity), GFP_KERNEL) {
            Ok(reporter) => {
                self.registered.populate(reporter);
            }
            Err(EBUSY) => dev_info!(
                dev,
                "free pages are reported for another device already, and not for this one\n"
            ),
            Err(error) => dev_warn!(dev, "free pages are not reported: {:?}\n", error),
        }
    }

    /// Goes on with the queue of a device that was reset.
    pub(crate) fn attach(&self, queue: ReportingQueue) {
        *self.reports.queue.lock() = queue;
    }

    /// The device has answered.
    pub(crate) fn queue_used(&self) {
        self.reports.answered.wake();
    }
}
