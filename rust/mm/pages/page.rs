// SPDX-License-Identifier: GPL-2.0

//! The `struct page` of a kernel page.
//!
//! C header: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h)

use crate::rust::bindings;

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::prelude::*;

/// The largest order of the page allocator.
pub(crate) const MAX_ORDER: u32 = bindings::BALLOON_MAX_PAGE_ORDER;

/// Returns the order of a pageblock, the unit in which the kernel groups pages by mobility.
pub(crate) fn pageblock_order() -> u32 {
    bindings::pageblock_order()
}

/// A field of `struct page`, of type `T`.
///
/// # Invariants
///
/// The struct has such a field at this offset. If `T` is an integer, other code may write the
/// field.
struct Field<T>(usize, PhantomData<T>);

// INVARIANT: These are fields of `struct page`; the flags are its first one.
const FLAGS: Field<c_ulong> = Field(0, PhantomData);
const LRU: Field<bindings::list_head> = Field(bindings::PAGE_LRU_OFFSET, PhantomData);
const INDEX: Field<usize> = Field(bindings::PAGE_INDEX_OFFSET, PhantomData);
const MAPPING: Field<usize> = Field(bindings::PAGE_MAPPING_OFFSET, PhantomData);
const PRIVATE: Field<usize> = Field(bindings::PAGE_PRIVATE_OFFSET, PhantomData);
const REFCOUNT: Field<u32> = Field(bindings::PAGE_REFCOUNT_OFFSET, PhantomData);
const TYPE: Field<u32> = Field(bindings::PAGE_TYPE_OFFSET, PhantomData);

/// A kernel page, by its `struct page`. All values may change at any time, unless the caller owns
/// the page.
///
/// # Invariants
///
/// The pointer is to a `struct page` of the memory map.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(in crate::rust) struct Page(NonNull<bindings::page>);

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for Page {}

// SAFETY: As above.
unsafe impl Sync for Page {}

impl Page {
    /// Makes one of a pointer, unless it is null.
    ///
    /// # Safety
    ///
    /// The pointer must be null or to a `struct page`.
    pub(in crate::rust) unsafe fn from_raw(page: *mut bindings::page) -> Option<Self> {
        // INVARIANT: By the requirements of this function.
        NonNull::new(page).map(Self)
    }

    /// Returns the page with the page frame number `pfn`, if that is online memory.
    pub(in crate::rust) fn online(pfn: usize) -> Option<Self> {
        // SAFETY: The function returns a page or null.
        unsafe { Self::from_raw(bindings::pfn_to_online_page(pfn)) }
    }

    /// Returns the page with the page frame number `pfn`.
    ///
    /// # Safety
    ///
    /// The page must exist.
    pub(in crate::rust) unsafe fn from_pfn(pfn: usize) -> Self {
        // INVARIANT: By the requirements of this function.
        //
        // SAFETY: The memory map has no null pointers.
        Self(unsafe { NonNull::new_unchecked(bindings::pfn_to_page(pfn)) })
    }

    /// Returns the page that is `n` pages after this one.
    ///
    /// # Safety
    ///
    /// Both must be of the same block.
    pub(in crate::rust) unsafe fn add(self, n: usize) -> Self {
        // INVARIANT: The memory map of a block is contiguous.
        //
        // SAFETY: By the requirements of this function.
        Self(unsafe { self.0.add(n) })
    }

    /// Returns the pointer.
    pub(in crate::rust) fn as_ptr(self) -> *mut bindings::page {
        self.0.as_ptr()
    }

    /// Returns the page frame number.
    pub(in crate::rust) fn pfn(self) -> usize {
        // SAFETY: By the type invariants.
        unsafe { bindings::page_to_pfn(self.as_ptr()) }
    }

    /// Returns the number of the node that the page is on.
    pub(in crate::rust) fn nid(self) -> usize {
        // SAFETY: By the type invariants.
        unsafe { bindings::page_to_nid(self.as_ptr()) as usize }
    }

    /// Returns the zone that the page is in.
    pub(in crate::rust) fn zone(self) -> *mut bindings::zone {
        // SAFETY: By the type invariants.
        unsafe { bindings::page_zone(self.as_ptr()) }
    }

    /// Returns the address of the page in the linear mapping.
    pub(in crate::rust) fn address(self) -> NonNull<u8> {
        // SAFETY: By the type invariants. There is no high memory in a 64-bit kernel, and no null
        // pointer in the linear mapping.
        unsafe { NonNull::new_unchecked(bindings::page_address(self.as_ptr()).cast()) }
    }

    /// Returns a pointer to the list head in the page.
    pub(in crate::rust) fn lru(self) -> *mut bindings::list_head {
        self.field(LRU)
    }

    /// Returns the page that the list head `lru` lies in.
    ///
    /// # Safety
    ///
    /// `lru` must point to the list head of a page.
    pub(in crate::rust) unsafe fn of_lru(lru: *mut bindings::list_head) -> Self {
        // INVARIANT: By the requirements of this function.
        //
        // SAFETY: As above, which makes the result valid and not null.
        Self(unsafe { NonNull::new_unchecked(lru.byte_sub(bindings::PAGE_LRU_OFFSET).cast()) })
    }

    fn field<T>(self, field: Field<T>) -> *mut T {
        self.as_ptr().wrapping_byte_add(field.0).cast()
    }

    fn read<T: Copy>(self, field: Field<T>) -> T {
        // SAFETY: By the type invariants of `Page` and `Field`. A volatile access stands for
        // READ_ONCE().
        unsafe { self.field(field).read_volatile() }
    }

    /// Returns a pointer to the flags.
    #[cfg(all(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST, CONFIG_MEMORY_FAILURE))]
    pub(in crate::rust::mm) fn flags(self) -> *mut c_ulong {
        self.field(FLAGS)
    }

    /// Returns the order of the block that begins with the page, if the driver owns that block.
    pub(in crate::rust::mm) fn order(self) -> u32 {
        self.read(INDEX) as u32
    }

    /// Stores the order of the block that begins with the page. It is in the `index` field: the
    /// balloon core uses the `private` field of its pages.
    ///
    /// # Safety
    ///
    /// The caller must own the page.
    pub(in crate::rust) unsafe fn set_order(self, order: u32) {
        // SAFETY: By the type invariants and the requirements of this function.
        unsafe { self.field(INDEX).write_volatile(order as usize) };
    }

    /// Sets the reference count.
    ///
    /// # Safety
    ///
    /// The caller must own the page.
    #[cfg_attr(not(CONFIG_MEMORY_HOTREMOVE), allow(dead_code))]
    pub(in crate::rust) unsafe fn set_count(self, count: u32) {
        // SAFETY: By the type invariants and the requirements of this function.
        unsafe { self.field(REFCOUNT).write_volatile(count) };
    }

    /// Returns the page's type, or a number that is not a type.
    fn page_type(self) -> u32 {
        self.read(TYPE)
    }

    /// Returns whether the page has a type.
    pub(in crate::rust) fn has_type(self) -> bool {
        // CAST: Types are negative, map counts are not.
        (self.page_type() as i32) < (bindings::pagetype_PGTY_mapcount_underflow << 24) as i32
    }

    /// Returns the order of the free block that begins with the page, if it is one.
    pub(in crate::rust) fn free_order(self) -> Option<u32> {
        let is_free = self.page_type() >> 24 == bindings::pagetype_PGTY_buddy;

        is_free.then(|| self.read(PRIVATE) as u32)
    }

    /// Returns whether the page is marked as offline: dumps leave out its content.
    pub(in crate::rust) fn is_offline(self) -> bool {
        self.page_type() >> 24 == bindings::pagetype_PGTY_offline
    }

    /// Returns whether the page has a flag.
    fn has_flag(self, flag: bindings::pageflags) -> bool {
        self.read(FLAGS) & (1 << flag) != 0
    }

    /// Returns whether the page has a memory error.
    pub(in crate::rust) fn has_error(self) -> bool {
        #[cfg(CONFIG_MEMORY_FAILURE)]
        return self.has_flag(bindings::pageflags_PG_hwpoison);
        #[cfg(not(CONFIG_MEMORY_FAILURE))]
        false
    }

    /// Returns whether the page is reserved.
    pub(in crate::rust) fn is_reserved(self) -> bool {
        self.has_flag(bindings::pageflags_PG_reserved)
    }

    /// Returns the first page of the folio that the page is in: the page itself, if it is in none.
    fn folio(self) -> Self {
        // SAFETY: By the type invariants. The first page of a folio is a page.
        //
        // INVARIANT: As above.
        Self(unsafe { NonNull::new_unchecked(bindings::page_folio(self.as_ptr()).cast()) })
    }

    /// Returns the number of references to the page.
    pub(in crate::rust) fn count(self) -> u32 {
        self.folio().read(REFCOUNT)
    }

    /// Returns whether the kernel can migrate the page without waiting for a disk or a server.
    pub(in crate::rust) fn is_movable(self) -> bool {
        let folio = self.folio();
        let is_anonymous = folio.read(MAPPING) & bindings::FOLIO_MAPPING_ANON as usize != 0;

        folio.has_flag(bindings::pageflags_PG_lru)
            && !folio.has_flag(bindings::pageflags_PG_locked)
            && !folio.has_flag(bindings::pageflags_PG_writeback)
            && (is_anonymous || !folio.has_flag(bindings::pageflags_PG_dirty))
    }
}
