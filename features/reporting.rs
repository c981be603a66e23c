// SPDX-License-Identifier: GPL-2.0

//! Free page reporting: the host learns which memory is free, and need not keep what is in it.
//!
//! The kernel's page reporting finds free pages from time to time, and sets them aside until the
//! host has answered. It serves one device; others go without.
//!
//! A host that does not answer owns the pages of one report until it is reset, which is why they
//! leave the floor. Nothing else waits for them but the kernel before it sleeps, so the device is
//! reset then, and before it takes memory offline, which stays online then.
//!
//! Specification: clause 5.5.6.7, Free Page Reporting.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::{
            Feature,
            Setup, //
        },
        queues::{
            Queue,
            Queues, //
        },
        settings::Settings,
        timeouts, //
    },
    rust::{
        fs::debugfs,
        mm::{
            memory,
            page_reporting::{
                FreePages,
                Report,
                ReportToken,
                Reporter, //
            }, //
        },
        notifiers::{
            memory_hotplug::{
                GoingOffline,
                OfflineNotifier, //
            },
            suspend::{
                SuspendNotifier,
                SuspendNotify, //
            }, //
        },
        virtio::{
            self,
            Virtqueue, //
        },
        work::{
            poll::poll,
            wait::Completion, //
        }, //
    }, //
};

use core::ops::Range;
use kernel::{
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc,
        Mutex,
        SetOnce, //
    }, //
};

/// A virtqueue for reports.
type ReportingQueue = Virtqueue<ReportToken>;

/// What reports go through.
#[pin_data]
struct Reports {
    dev: ARef<virtio::Device>,
    settings: Arc<Settings>,
    /// Locked for as long as a report is on its way.
    #[pin]
    queue: Mutex<ReportingQueue>,
    #[pin]
    answered: Completion,
    /// Set while the system is about to sleep, or memory about to go offline: nothing is reported.
    sleeping: Atomic<bool>,
    going_offline: Atomic<bool>,
    /// Set when the system cannot sleep for a report that is on its way.
    out_of_time: Atomic<bool>,
    /// How much was reported, in bytes.
    #[pin]
    reported: debugfs::File<Atomic<u64>>,
}

impl Report for Reports {
    fn report(&self, pages: FreePages<'_>) -> Result {
        // A device may keep these pages for as long as it likes. They are set aside already: who
        // takes memory after this look knows of them, and who had looked before has taken his.
        let taking = memory::ReserveGuard::begin();
        let available = match pages.are_movable() {
            true => memory::available_pages(),
            false => memory::kernel_available_pages(),
        };
        drop(taking);
        if available < self.settings.floor_pages() {
            return Err(EBUSY);
        }

        let mut queue = self.queue.lock();
        if self.sleeping.load(Acquire) || self.going_offline.load(Acquire) {
            return Err(EBUSY);
        }
        queue.report_and_wait(
            &pages,
            &self.answered,
            timeouts::MISSED_REPORT_INTERRUPT,
            || !self.out_of_time.load(Acquire),
        )?;
        self.reported.add(pages.bytes(), Relaxed);
        Ok(())
    }
}

impl Reports {
    /// Waits until no report is on its way, but not longer than [`timeouts::UNRESPONSIVE`]. Returns
    /// whether none is.
    fn settle(&self) -> bool {
        let is_settled = || self.queue.try_lock().map(|_| ());

        poll(timeouts::POLL_INTERVAL, timeouts::UNRESPONSIVE, is_settled).is_some()
    }
}

impl SuspendNotify for Reports {
    fn before_suspend(&self) {
        self.sleeping.store(true, Release);
        if !self.settle() {
            dev_warn!(
                self.dev,
                "the device does not answer a report of free pages: resetting it, since the system wants to sleep\n"
            );
            self.out_of_time.store(true, Release);
            self.answered.complete();
        }
    }

    fn after_suspend(&self) {
        if self.out_of_time.load(Acquire) {
            // As long as that is set nothing keeps the lock for the device's sake.
            if self.queue.lock().is_reset() {
                dev_warn!(
                    self.dev,
                    "the system did not sleep, and the device was reset: no more ballooning until the driver is bound again\n"
                );
            }
            self.out_of_time.store(false, Release);
        }
        self.sleeping.store(false, Release);
    }
}

impl GoingOffline for Reports {
    /// Pages that are set aside for a report are neither in use nor free, and the kernel would try
    /// over and over. It sets none aside any more of those that are to go, but may have done so.
    fn going_offline(&self, _pfns: Range<u64>) -> Result {
        self.going_offline.store(true, Release);
        self.settle().then_some(()).ok_or(EBUSY)
    }

    fn offline_over(&self) {
        self.going_offline.store(false, Release);
    }
}

/// Free page reporting of a device.
///
/// It has to be dropped after the device was reset, since a device that does not answer keeps a
/// report until then.
pub(crate) struct Reporting {
    _sleep: Pin<KBox<SuspendNotifier<Reports>>>,
    _offline: Pin<KBox<OfflineNotifier<Reports>>>,
    registered: SetOnce<Pin<KBox<Reporter<Reports>>>>,
    reports: Arc<Reports>,
}

impl Reporting {
    /// Sets the feature up, if it was negotiated.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        let Some(queue) = setup.queues.take(Queue::Report)? else {
            return Ok(None);
        };
        let reports = try_pin_init!(Reports {
            dev: (&**setup.dev).into(),
            settings: setup.settings.clone(),
            queue <- new_mutex!(queue, "Reporting::queue"),
            answered <- Completion::new(),
            sleeping: Atomic::new(false),
            going_offline: Atomic::new(false),
            out_of_time: Atomic::new(false),
            reported <- setup.dir.file(c"reported_bytes", Atomic::new(0)),
        });
        let reports = Arc::pin_init(reports, GFP_KERNEL)?;
        let reporting = Self {
            _sleep: KBox::pin_init(SuspendNotifier::new(reports.clone()), GFP_KERNEL)?,
            _offline: KBox::pin_init(OfflineNotifier::new(reports.clone()), GFP_KERNEL)?,
            registered: SetOnce::new(),
            reports,
        };

        Ok(Some(Arc::new(reporting, GFP_KERNEL)?))
    }
}

impl Feature for Reporting {
    /// Begins, unless it has begun before.
    fn ready(&self, dev: &virtio::Device<Core<'_>>) {
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

    fn queue_used(&self, queue: Queue) {
        if queue == Queue::Report {
            self.reports.answered.complete();
        }
    }

    fn restore(&self, _dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        if let Some(queue) = queues.take(Queue::Report)? {
            *self.reports.queue.lock() = queue;
        }
        Ok(())
    }
}
