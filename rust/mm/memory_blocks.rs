// SPDX-License-Identifier: GPL-2.0

//! Memory blocks, the pieces of memory that the kernel takes offline and online.
//!
//! Where the kernel writes to all memory that it allocates, a memory block is the way to memory that
//! it has not written to: the block goes offline, which only takes its pages off the free lists, and
//! comes online again, for which the kernel asks a callback what to do with the pages. This callback
//! keeps them.
//!
//! The functions for that are not exported to modules, except the callback's: the kernel is asked
//! as an administrator would, by files in /sys.
//!
//! C header: [`include/linux/memory_hotplug.h`](srctree/include/linux/memory_hotplug.h)

use crate::rust::{
    bindings,
    mm::page_list::PageList,
    virtio, //
};

use core::{
    ops::Range,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    error::{
        code::ERESTARTNOINTR,
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    str::CString,
    time::Msecs,
    types::NotThreadSafe, //
};

/// How long it may take to bring a block online. The kernel does not look for a signal then, and does
/// no more than to write to the `struct page`s.
const ONLINE_PATIENCE: Msecs = 1_000;

/// How many times it is tried while others take memory offline or online. The kernel waits for 5
/// milliseconds each time.
const TRIES: usize = 40;

/// A memory block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MemoryBlock(u64);

/// What has become of a block that was to be taken.
pub(crate) enum Taken {
    /// These are its pages.
    Pages(PageList),
    /// It is as it was: the kernel does not take it offline (`EINTR`: not in time), or others have
    /// brought it online.
    Not(Error),
    /// It is offline, and could not be brought online.
    Offline,
}

impl MemoryBlock {
    /// Returns how many kernel pages a block has: none if the kernel does not take memory offline.
    pub(crate) fn pages() -> u64 {
        // SAFETY: The function has no preconditions.
        unsafe { bindings::balloon_rs_memory_block_pages() as u64 }
    }

    /// Returns the block in which the page `pfn` (of a kernel page) lies, where blocks have `pages`
    /// pages.
    pub(crate) fn of(pfn: u64, pages: u64) -> Option<Self> {
        pfn.checked_div(pages).map(Self)
    }

    /// Returns the block's page frame numbers, in kernel pages.
    pub(crate) fn pfns(self) -> Range<u64> {
        let pages = Self::pages();
        let first = self.0.saturating_mul(pages);

        first..first.saturating_add(pages)
    }

    /// Returns whether the caller is called by a thread that takes a block, of this driver's.
    pub(in crate::rust) fn is_being_taken() -> bool {
        // SAFETY: The function has no preconditions.
        unsafe { bindings::balloon_rs_is_taking() }
    }

    /// Returns whether the block looks as if it could be taken: its pages are free, or the kernel
    /// can move them.
    pub(crate) fn can_be_taken(self) -> bool {
        Self::range_can_be_taken(self.pfns())
    }

    /// The same of the memory block with `pfns` (page frame numbers of kernel pages).
    pub(in crate::rust) fn range_can_be_taken(pfns: Range<u64>) -> bool {
        // SAFETY: The function looks whether there are such pages.
        unsafe {
            bindings::balloon_rs_can_take_block(
                pfns.start as usize,
                pfns.end.saturating_sub(pfns.start) as usize,
            )
        }
    }

    /// Writes to the file that says whether the block is online. What takes longer than `patience`
    /// ends when it is interrupted.
    fn write(self, what: &CStr, patience: Msecs) -> Result {
        let path =
            CString::try_from_fmt(fmt!("/sys/devices/system/memory/memory{}/state", self.0))?;

        // SAFETY: The path is a C string, the buffer is as long as is said, and the file is closed
        // at the end.
        unsafe {
            let file = from_err_ptr(bindings::balloon_rs_open_as_init(
                path.as_char_ptr(),
                bindings::O_WRONLY as c_int,
            ))?;
            let mut written = 0;

            for _ in 0..TRIES {
                written = bindings::balloon_rs_write_within(
                    file,
                    what.as_char_ptr(),
                    what.to_bytes().len(),
                    patience,
                );
                if written != ERESTARTNOINTR.to_errno() as isize {
                    break;
                }
            }
            bindings::fput(file);
            to_result(written.min(0) as c_int)
        }
    }

    /// Brings the block online, as what it was before.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(crate) fn bring_online(self) -> Result {
        self.write(c"online_kernel", ONLINE_PATIENCE)
    }

    /// Takes the block, all or nothing. What is in use of it is moved elsewhere, for which there is
    /// as much time as `patience` says.
    pub(crate) fn take(self, patience: Msecs) -> Taken {
        let _turn = Turn::wait();

        if let Err(error) = self.write(c"offline", patience) {
            return Taken::Not(error);
        }
        let kept = Kept::begin(self.pfns());
        let online = self.bring_online();
        let pages = kept.map_or(PageList::new(), Kept::end);

        match online {
            // Others may have brought it online.
            _ if !pages.is_empty() => Taken::Pages(pages),
            Ok(()) | Err(EINVAL) => Taken::Not(EINVAL),
            Err(_) => Taken::Offline,
        }
    }
}

/// The right to take blocks. One thread at a time has it, of all devices.
struct Turn(NotThreadSafe);

impl Turn {
    /// Waits for it: at most for as long as taking a block takes.
    fn wait() -> Self {
        // SAFETY: The function has no preconditions but that it may sleep, as its callers may.
        unsafe { bindings::balloon_rs_begin_taking() };
        Self(NotThreadSafe)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // SAFETY: This thread has begun when it made this value, which stays with it.
        unsafe { bindings::balloon_rs_end_taking() };
    }
}

/// As long as it exists, pages that come online are kept.
struct Kept(());

impl Kept {
    /// Begins to keep the pages in `pfns` (page frame numbers of kernel pages). Only for who has a
    /// [`Turn`].
    fn begin(pfns: Range<u64>) -> Option<Self> {
        // SAFETY: The function has no preconditions but that it may sleep, as its callers may.
        to_result(unsafe {
            bindings::balloon_rs_keep_online(
                pfns.start as usize,
                pfns.end.saturating_sub(pfns.start) as usize,
            )
        })
        .ok()?;
        Some(Self(()))
    }

    /// Ends it, and returns the pages.
    fn end(self) -> PageList {
        let mut pages = PageList::new();

        drop(self);
        // SAFETY: The function returns blocks that are marked, each once, and unused elsewhere: they
        // are the list's from here on.
        unsafe {
            while let Some(page) = NonNull::new(bindings::balloon_rs_next_kept()) {
                pages.push_block(page);
            }
        }
        pages
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: The function has no preconditions but that it may sleep, as its callers may. It
        // waits for who brings memory online just now.
        unsafe { bindings::balloon_rs_keep_no_more() };
    }
}

/// Returns whether the guest has a virtio-mem device, whose driver keeps pages that come online all
/// the time, as only one can.
pub(crate) fn has_virtio_mem(dev: &virtio::Device) -> bool {
    // SAFETY: By the type invariants of `Device`, which is nothing but a `virtio_device`, it is
    // valid, and on a bus.
    unsafe { bindings::balloon_rs_has_virtio_mem(ptr::from_ref(dev).cast_mut().cast()) }
}
