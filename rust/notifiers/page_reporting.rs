// SPDX-License-Identifier: GPL-2.0

//! Free page reporting: the kernel isolates free pages, reports them, and returns them to the free
//! lists.
//!
//! C header: [`include/linux/page_reporting.h`](srctree/include/linux/page_reporting.h)

use crate::rust::{
    bindings,
    mm::{
        pages::page::Page,
        zone::Zone, //
    },
    virtio::{
        sg_bytes,
        Access,
        Virtqueue, //
    },
    work::wait::Completion, //
};

use core::marker::PhantomData;
use kernel::{
    container_of,
    error::{
        from_result,
        to_result, //
    },
    page::PAGE_SHIFT,
    prelude::*,
    sync::Arc,
    time::Msecs,
    types::Opaque, //
};

/// The default of the smallest reported order: 2 MiB, the size of a huge page of most hosts. The
/// kernel's own default is a pageblock, which has that size, or up to 512 MiB with pages of 64 KiB.
const ORDER: c_uint = 21u32.saturating_sub(PAGE_SHIFT as u32);

/// Isolated free pages, which cannot be allocated.
///
/// # Invariants
///
/// `sg` is a list of `n` entries, whose memory is free and isolated for `'a`.
pub(crate) struct FreePages<'a> {
    sg: *mut bindings::scatterlist,
    n: c_uint,
    bytes: u64,
    _aside: PhantomData<&'a mut ()>,
}

impl FreePages<'_> {
    /// Returns the size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns whether they are in `ZONE_MOVABLE`. The pages of one report are of one zone.
    pub(crate) fn are_movable(&self) -> bool {
        // The lowest two bits tell whether the list continues.
        //
        // SAFETY: By the type invariants the list has entries, of valid pages.
        unsafe { Page::from_raw(((*self.sg).page_link & !3) as *mut bindings::page) }
            .is_some_and(|page| Zone::of(page).is_movable())
    }
}

/// An implementation of free page reports.
pub(crate) trait Report: Send + Sync {
    /// Reports `pages`, which return to the free lists when this returns.
    ///
    /// Called in process context, by a freezable work.
    ///
    /// # Errors
    ///
    /// Any error means that they were not reported. The kernel will report the pages again.
    fn report(&self, pages: FreePages<'_>) -> Result;
}

/// The registration of a [`Report`], which is called as long as this exists.
///
/// # Invariants
///
/// `info` is registered, with a callback for a `Reporter<T>`.
#[pin_data(PinnedDrop)]
pub(crate) struct Reporter<T: Report> {
    #[pin]
    info: Opaque<bindings::page_reporting_dev_info>,
    who: Arc<T>,
}

// SAFETY: A registration may be undone from any thread, and `T` is `Send` and `Sync`.
unsafe impl<T: Report> Send for Reporter<T> {}

// SAFETY: `who` is only accessed through a shared reference.
unsafe impl<T: Report> Sync for Reporter<T> {}

impl<T: Report> Reporter<T> {
    /// Returns an initialiser for a registration of `who`, which accepts at most `capacity` ranges
    /// of memory at a time.
    ///
    /// # Errors
    ///
    /// `EBUSY` if there is already one: the kernel supports one only.
    pub(crate) fn new(who: Arc<T>, capacity: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            who,
            // The last field that is initialised, since the kernel may call back at once.
            info <- Opaque::try_ffi_init(|slot: *mut bindings::page_reporting_dev_info| {
                // SAFETY: `slot` is valid for writes, and pinned until it is unregistered. All
                // fields that are not set here may be zero.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).report = Some(Self::callback);
                    (*slot).order = ORDER;
                    // CAST: A virtqueue has at most 2^15 entries.
                    (*slot).capacity = capacity as c_uint;
                    to_result(bindings::page_reporting_register(slot))
                }
            }),
        })
    }

    /// # Safety
    ///
    /// Only for free page reporting, which calls it with the `info` of a `Reporter<T>` and a list
    /// of `n` entries, whose pages it has isolated until this returns.
    unsafe extern "C" fn callback(
        info: *mut bindings::page_reporting_dev_info,
        sg: *mut bindings::scatterlist,
        n: c_uint,
    ) -> c_int {
        // SAFETY: By the requirements of this function. By the type invariants the struct is part
        // of a live `Reporter<T>`.
        let (this, bytes) = unsafe {
            (
                &*container_of!(Opaque::cast_from(info), Self, info),
                sg_bytes(sg, n),
            )
        };

        from_result(|| {
            // INVARIANT: By the requirements of this function.
            this.who.report(FreePages {
                sg,
                n,
                bytes,
                _aside: PhantomData,
            })?;
            Ok(0)
        })
    }
}

#[pinned_drop]
impl<T: Report> PinnedDrop for Reporter<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the struct is registered. When this returns the callback
        // does not run.
        unsafe { bindings::page_reporting_unregister(self.info.get()) };
    }
}

/// Memory that is passed to the device without being owned by the queue.
pub(crate) struct ReportToken(());

impl Virtqueue<ReportToken> {
    /// Passes `pages` to the device, and waits until it has used them, or for as long as `may_wait`
    /// returns true. `used` must be completed when either changes. The wait also checks both at
    /// intervals of `interval`.
    ///
    /// Until then the device may write to the pages, so there is no timeout. Only a reset ends the
    /// wait early: a reset by another thread, on unbind, suspend or shutdown, or by this one when
    /// `may_wait` returns false.
    ///
    /// # Errors
    ///
    /// `EIO` if the pages cannot be sent, `ENODEV` if the device was reset.
    pub(crate) fn report_and_wait(
        &mut self,
        pages: &FreePages<'_>,
        used: &Completion,
        interval: Msecs,
        may_wait: impl Fn() -> bool,
    ) -> Result {
        // SAFETY: By the type invariants of `FreePages` the memory is not in use while it is
        // borrowed, and this does not return before the device has used it or was reset.
        unsafe { self.add_sg(pages.sg, pages.n, Access::Write, ReportToken(())) }
            .map_err(|_| EIO)?;
        self.kick();

        let mut is_used = false;
        used.wait_until(interval, || {
            is_used = self.next_used().is_some();
            is_used || self.is_reset() || !may_wait()
        });

        if !is_used {
            self.reset_device();
        }
        is_used.then_some(()).ok_or(ENODEV)
    }
}
