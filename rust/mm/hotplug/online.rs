// SPDX-License-Identifier: GPL-2.0

//! Taking memory offline and online.
//!
//! C header: [`include/linux/memory_hotplug.h`](srctree/include/linux/memory_hotplug.h)

use crate::rust::{
    bindings,
    mm::{
        hotplug::exclusion::CallbackTurn,
        locks::{
            HOTPLUG,
            KEPT, //
        },
        memory::adjust_managed,
        pages::{
            owned::Block,
            page::{
                Page,
                MAX_ORDER, //
            },
            page_list::PageList,
            ring::Linked, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    },
    work::poll::poll_timeout, //
};

use core::{
    marker::PhantomData,
    ptr, //
};
use kernel::{
    current,
    error::{
        code::ERESTARTNOINTR,
        to_result, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        lock::GlobalGuard, //
    },
    time::Delta, //
};

/// The thread that takes a block, or null.
static TAKING: Atomic<*mut c_void> = Atomic::new(ptr::null_mut());

fn this_thread() -> *mut c_void {
    ptr::from_ref(current!()).cast_mut().cast()
}

/// Returns whether the current thread is taking a block for this driver.
pub(in crate::rust) fn is_taking() -> bool {
    TAKING.load(Relaxed) == this_thread()
}

/// How many threads have a guard, or wait for one.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static HOTPLUG_GUARDS: Atomic<usize> = Atomic::new(0);

/// How long to wait for the right to take blocks.
const PATIENCE: Delta = Delta::from_secs(2);

/// The right to take blocks. One thread of all devices has it at a time.
pub(crate) struct HotplugGuard {
    _lock: GlobalGuard<HOTPLUG>,
}

impl HotplugGuard {
    /// Waits for it, much longer than it takes to take a block.
    ///
    /// # Errors
    ///
    /// `ERESTARTNOINTR` after [`PATIENCE`]: a thread allocates a contiguous range meanwhile, for
    /// which the kernel may wait for the disk.
    pub(crate) fn begin() -> Result<Self> {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        HOTPLUG_GUARDS.add(1, Relaxed);
        let Some(lock) = poll_timeout(PATIENCE, || HOTPLUG.try_lock()) else {
            #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
            HOTPLUG_GUARDS.fetch_sub(1, Relaxed);
            return Err(ERESTARTNOINTR);
        };

        TAKING.store(this_thread(), Relaxed);
        Ok(Self { _lock: lock })
    }
}

impl Drop for HotplugGuard {
    fn drop(&mut self) {
        TAKING.store(ptr::null_mut(), Relaxed);
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        HOTPLUG_GUARDS.fetch_sub(1, Relaxed);
    }
}

/// The driver's callback for pages that come online, as long as this exists.
///
/// # Invariants
///
/// The kernel's callback is [`keep_page`].
pub(in crate::rust::mm) struct OnlinePageCallback<'a> {
    // Ends when the callback is restored.
    _turn: CallbackTurn,
    _guard: PhantomData<&'a HotplugGuard>,
}

impl<'a> OnlinePageCallback<'a> {
    /// Sets the callback, which keeps the pages in `pfns`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if another driver has set a callback, `ERESTARTNOINTR` if another thread takes
    /// memory offline.
    pub(in crate::rust::mm) fn set(_guard: &'a HotplugGuard, pfns: PfnRange) -> Result<Self> {
        let turn = CallbackTurn::begin()?;

        KEPT.lock().keep(pfns);
        #[cfg(CONFIG_MEMORY_HOTREMOVE)]
        // SAFETY: The function is such a callback, and exists until this is dropped.
        to_result(unsafe { bindings::set_online_page_callback(Some(keep_page)) })?;

        // INVARIANT: The callback was set. Without memory hotplug no block gets here.
        Ok(Self {
            _turn: turn,
            _guard: PhantomData,
        })
    }

    /// Restores the kernel's callback, and returns the pages.
    pub(in crate::rust::mm) fn restore(self) -> PageList {
        drop(self);
        KEPT.lock().take()
    }
}

impl Drop for OnlinePageCallback<'_> {
    fn drop(&mut self) {
        #[cfg(CONFIG_MEMORY_HOTREMOVE)]
        // SAFETY: By the type invariants. The function waits for threads that bring memory online,
        // or begin to take it offline and will be refused.
        unsafe {
            bindings::restore_online_page_callback(Some(keep_page))
        };
    }
}

/// Makes an allocated and marked block of pages that come online.
///
/// # Safety
///
/// Only for the kernel, which calls it with the first of 2^`order` pages that come online, and
/// passes on their ownership. All of them have a reference, are marked, and are not managed.
#[cfg(CONFIG_MEMORY_HOTREMOVE)]
unsafe extern "C" fn keep_page(page: *mut bindings::page, order: c_uint) {
    // SAFETY: By the requirements of this function.
    let Some(first) = (unsafe { Page::from_raw(page) }) else {
        return;
    };

    // A user may bring the block online as movable memory. Pages of the balloon are not movable.
    if Zone::of(first).is_movable() || !KEPT.lock().keeps(first.pfn()) {
        // SAFETY: The kernel does the same without a callback.
        return unsafe { bindings::generic_online_page(page, order) };
    }

    // SAFETY: By the requirements of this function it is a marked block of this order, which the
    // driver owns from here on.
    let block = unsafe {
        for n in 1..1 << order {
            first.add(n).set_count(0);
        }
        first.set_order(order);
        allow_access(first, order);
        Block::from_page(first)
    };
    adjust_managed(first, 1 << order);
    KEPT.lock().push(block);
}

/// Makes KASAN accept accesses to the pages, as if they were allocated.
///
/// # Safety
///
/// The page must begin a block of this order that the caller owns.
#[cfg(CONFIG_MEMORY_HOTREMOVE)]
unsafe fn allow_access(_page: Page, _order: u32) {
    #[cfg(CONFIG_KASAN_GENERIC)]
    {
        unsafe extern "C" {
            // From mm/kasan/kasan.h. The value 0 marks accessible memory.
            fn kasan_poison(addr: *const c_void, size: usize, value: u8, init: bool);
        }
        // SAFETY: By the requirements of this function.
        unsafe {
            kasan_poison(
                _page.address().as_ptr().cast(),
                kernel::page::PAGE_SIZE << _order,
                0,
                false,
            )
        };
    }
}

/// Returns whether memory would come online in its current zone, which depends on its address.
fn comes_back(zone: Zone, pfns: PfnRange) -> bool {
    match zone.kind() {
        bindings::zone_type_ZONE_MOVABLE => false,
        bindings::zone_type_ZONE_NORMAL => true,
        _ => zone
            .span()
            .is_some_and(|span| span.first() < pfns.first() && pfns.end() < span.end()),
    }
}

/// Returns whether the memory block with the pages `pfns` can probably be taken: they are of one
/// zone, in which they also come online, and are free or can be migrated. A block with a memory
/// error would not come online again. This takes no lock: if the result changes at once, the kernel
/// does not take the block offline.
pub(in crate::rust) fn range_can_be_taken(pfns: PfnRange) -> bool {
    let Some(first) = Page::online(pfns.first() as usize) else {
        return false;
    };
    let zone = Zone::of(first);
    if is_early(first) || !comes_back(zone, pfns) {
        return false;
    }

    let mut pfn = pfns.first() as usize;
    while pfn < pfns.end() as usize {
        let Some(page) = Page::online(pfn).filter(|&page| Zone::of(page) == zone) else {
            return false;
        };

        pfn += match page.free_order() {
            Some(order) if order <= MAX_ORDER => 1 << order,
            Some(_) => 1,
            None if is_in_the_way(page) => return false,
            None => 1,
        };
    }
    true
}

/// Returns whether a page that is not free cannot be migrated.
fn is_in_the_way(page: Page) -> bool {
    page.has_type()
        || page.is_reserved()
        || page.has_error()
        || page.count() > 0 && !page.is_movable()
}

/// Returns whether the page is boot memory, if the kernel refuses to take that offline and logs
/// each attempt.
fn is_early(page: Page) -> bool {
    #[cfg(all(CONFIG_ARM64, CONFIG_SPARSEMEM))]
    // SAFETY: A page of the memory map is in a section.
    return unsafe { bindings::pfn_in_early_section(page.pfn()) };
    #[cfg(not(all(CONFIG_ARM64, CONFIG_SPARSEMEM)))]
    {
        let _ = page;
        false
    }
}
