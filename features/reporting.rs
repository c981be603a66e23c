// SPDX-License-Identifier: GPL-2.0

//! Free page reporting: the guest reports free memory, and the host may discard its content.
//!
//! The kernel's page reporting periodically isolates free pages until the device has used the
//! report. It supports one device only.
//!
//! An unresponsive device owns the pages of one report until it is reset, so reports respect the
//! reserve. Only system suspend and memory offlining wait for a report: suspend resets the device,
//! and offlining fails.
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
        mm::memory,
        notifiers::{
            memory_hotplug::{
                GoingOffline,
                OfflineNotifier, //
            },
            page_reporting::{
                FreePages,
                Report,
                ReportToken,
                Reporter, //
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
            poll::poll_timeout,
            wait::Completion, //
        }, //
    }, //
};

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
    },
    time::Delta, //
};

/// A virtqueue for reports.
type ReportingQueue = Virtqueue<ReportToken>;

/// The queue of reports.
#[pin_data]
struct Reports {
    dev: ARef<virtio::Device>,
    settings: Arc<Settings>,
    /// Locked while a report is in flight.
    #[pin]
    queue: Mutex<ReportingQueue>,
    #[pin]
    used: Completion,
    /// Set while the system is about to suspend, or memory about to go offline: new reports are
    /// refused.
    sleeping: Atomic<bool>,
    going_offline: Atomic<bool>,
    /// Set when a report in flight prevents the system from suspending.
    out_of_time: Atomic<bool>,
    /// The reported memory in bytes.
    #[pin]
    reported: debugfs::File<Atomic<u64>>,
}

impl Report for Reports {
    fn report(&self, pages: FreePages<'_>) -> Result {
        // A device may hold these pages without a limit. They are already isolated: callers that
        // check the reserve later see that, and callers that checked it earlier have already
        // allocated.
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
            &self.used,
            timeouts::MISSED_REPORT_INTERRUPT,
            || !self.out_of_time.load(Acquire),
        )?;
        self.reported.add(pages.bytes(), Relaxed);
        Ok(())
    }
}

impl Reports {
    /// Waits until no report is in flight, but not longer than `timeout`. Returns whether none is.
    fn settle(&self, timeout: Delta) -> bool {
        let is_settled = || self.queue.try_lock().map(|_| ());

        poll_timeout(timeout, is_settled).is_some()
    }
}

impl SuspendNotify for Reports {
    fn before_suspend(&self) {
        self.sleeping.store(true, Release);
        if !self.settle(timeouts::TEARDOWN_STALL) {
            dev_warn!(
                self.dev,
                "the device does not return a report of free pages: resetting it for the system suspend\n"
            );
            self.out_of_time.store(true, Release);
            self.used.complete();
        }
    }

    fn after_suspend(&self) {
        if self.out_of_time.load(Acquire) {
            // While that is set, no thread holds the lock to wait for the device.
            if self.queue.lock().is_reset() {
                dev_warn!(
                    self.dev,
                    "the system did not suspend, and the device was reset: no more ballooning until the driver is bound again\n"
                );
            }
            self.out_of_time.store(false, Release);
        }
        self.sleeping.store(false, Release);
    }
}

impl GoingOffline for Reports {
    /// Pages that are isolated for a report are neither in use nor free, and the kernel would retry
    /// without end. It isolates no more pages of memory that goes offline, but may have isolated
    /// some before.
    fn going_offline(&self) -> Result {
        self.going_offline.store(true, Release);
        self.settle(timeouts::GOING_OFFLINE)
            .then_some(())
            .ok_or(EBUSY)
    }

    fn offline_over(&self) {
        self.going_offline.store(false, Release);
    }
}

/// Free page reporting of a device.
///
/// It must be dropped after the device was reset, since an unresponsive device holds a report until
/// then.
pub(crate) struct Reporting {
    _sleep: Pin<KBox<SuspendNotifier<Reports>>>,
    _offline: Pin<KBox<OfflineNotifier<Reports>>>,
    registered: SetOnce<Pin<KBox<Reporter<Reports>>>>,
    reports: Arc<Reports>,
}

impl Reporting {
    /// Sets up the feature, if it was negotiated.
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
            queue <- new_mutex!(queue, "Reports::queue"),
            used <- Completion::new(),
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
    /// Starts reporting, unless it has started before.
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

    fn queue_used(&self) {
        self.reports.used.complete();
    }

    fn restore(&self, _dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        if let Some(queue) = queues.take(Queue::Report)? {
            *self.reports.queue.lock() = queue;
        }
        Ok(())
    }
}
