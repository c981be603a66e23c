// SPDX-License-Identifier: GPL-2.0

//! Memory blocks, the units of memory that the kernel takes offline and online.
//!
//! If the kernel zeroes all memory that it allocates, a memory block is a way to memory without
//! zeroing. Taking a block offline only removes its pages from the free lists. When the block comes
//! online again, the kernel passes the pages to a callback, and this callback keeps them.
//!
//! The functions for that are not exported to modules, except the one for the callback: the driver
//! writes to files in /sys instead.
//!
//! C header: [`include/linux/memory_hotplug.h`](srctree/include/linux/memory_hotplug.h)

use crate::rust::{
    bindings,
    fs::file::WritableFile,
    mm::{
        hotplug::online::{
            range_can_be_taken,
            HotplugGuard, //
            OnlinePageCallback,
        },
        node::Node,
        pages::{
            page::Page,
            page_list::PageList, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    },
    virtio::{
        self,
        DeviceId, //
    },
    work::deadline, //
};

use kernel::{
    error::code::{
        ECANCELED,
        ERESTARTNOINTR, //
    },
    prelude::*,
    str::CString,
    time::{
        Delta,
        Instant,
        Monotonic,
        Msecs, //
    }, //
};

/// The value that restores a block's previous state.
const ONLINE_KERNEL: &CStr = c"online_kernel";

/// How long the kernel may try to take a block offline, and to bring it online.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) offline: Msecs,
    pub(crate) online: Msecs,
    /// How long to wait for other threads that take memory offline or online.
    pub(crate) busy: Delta,
}

/// A memory block: its kernel pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryBlock(PfnRange);

/// The result of taking a block.
pub(crate) enum Outcome {
    /// These are its pages.
    Pages(PageList),
    /// It has not changed: the kernel has refused to take it offline (`EINTR`: not in time), or
    /// another thread has brought it online.
    Not(Error),
    /// It could not be brought online.
    Offline(OfflineBlock),
}

impl MemoryBlock {
    /// Returns how many kernel pages a block has: none if the kernel cannot take memory offline.
    pub(crate) fn pages() -> u64 {
        #[cfg(CONFIG_MEMORY_HOTREMOVE)]
        return bindings::memory_block_size_bytes() as u64 >> kernel::page::PAGE_SHIFT;
        #[cfg(not(CONFIG_MEMORY_HOTREMOVE))]
        0
    }

    /// Returns the block in which the page `pfn` (of a kernel page) lies, where blocks have `pages`
    /// pages.
    pub(crate) fn of(pfn: u64, pages: u64) -> Option<Self> {
        let number = pfn.checked_div(pages)?;

        PfnRange::new(number.checked_mul(pages)?, pages).map(Self)
    }

    /// Returns the block's pages.
    pub(crate) fn pfns(self) -> PfnRange {
        self.0
    }

    /// Returns the node of its first page, none if that is not online.
    pub(crate) fn node(self) -> Option<Node> {
        let page = Page::online(self.pfns().first() as usize)?;

        Node::new(page.nid())
    }

    /// Returns the zone of its first page, none if that is not online.
    pub(crate) fn zone(self) -> Option<Zone> {
        Page::online(self.pfns().first() as usize).map(Zone::of)
    }

    /// Returns the block's number, which is in its name.
    fn number(self) -> Option<u64> {
        self.0.first().checked_div(self.0.len())
    }

    /// Records a memory error in the first page of the block, which must be free.
    ///
    /// # Errors
    ///
    /// The kernel's error, `EOPNOTSUPP` if it does not support memory errors.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn break_first_page(self) -> Result {
        #[cfg(CONFIG_MEMORY_FAILURE)]
        {
            let pfn = self.pfns().first() as usize;
            // SAFETY: The function accepts any number.
            kernel::error::to_result(unsafe {
                bindings::memory_failure(pfn, bindings::mf_flags_MF_SW_SIMULATED as c_int)
            })
        }
        #[cfg(not(CONFIG_MEMORY_FAILURE))]
        Err(EOPNOTSUPP)
    }

    /// Returns whether the block can probably be taken: its pages are free, or the kernel can
    /// migrate them.
    pub(crate) fn can_be_taken(self) -> bool {
        range_can_be_taken(self.pfns())
    }

    /// Takes the block offline. The kernel migrates pages in use.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub(crate) fn take_offline(self, limits: Limits) -> Result<OfflineBlock> {
        // While the block is offline, an allocation for this might fail.
        let state = StateFile::open(self)?;

        state.write(c"offline", limits.offline, limits.busy)?;
        Ok(OfflineBlock { state, limits })
    }

    /// Takes the whole block or nothing, if it `is_wanted` when other devices have taken theirs.
    /// The kernel migrates pages in use.
    pub(crate) fn take(self, limits: Limits, is_wanted: impl FnOnce() -> bool) -> Outcome {
        match HotplugGuard::begin() {
            Ok(guard) if is_wanted() => self.take_and_write(&guard, limits, ONLINE_KERNEL),
            Ok(_) => Outcome::Not(ECANCELED),
            Err(error) => Outcome::Not(error),
        }
    }

    /// The same, but with `online` written to the block's file.
    pub(crate) fn take_and_write(
        self,
        guard: &HotplugGuard,
        limits: Limits,
        online: &CStr,
    ) -> Outcome {
        match self.take_offline(limits) {
            Ok(block) => self.take_online(block, guard, online),
            Err(error) => Outcome::Not(error),
        }
    }

    /// Takes the first half of the block: it is `offline` until [`take_rest`](Self::take_rest).
    ///
    /// # Errors
    ///
    /// `ECANCELED` if it is not wanted when other devices have taken theirs, `ERESTARTNOINTR` if
    /// these need too long, or the kernel's error.
    pub(crate) fn take_first(
        self,
        limits: Limits,
        is_wanted: impl FnOnce() -> bool,
    ) -> Result<OfflineBlock> {
        let _guard = HotplugGuard::begin()?;

        match is_wanted() {
            true => self.take_offline(limits),
            false => Err(ECANCELED),
        }
    }

    /// Takes the block, which is `offline`.
    pub(crate) fn take_rest(self, offline: OfflineBlock) -> Outcome {
        match HotplugGuard::begin() {
            Ok(guard) => self.take_online(offline, &guard, ONLINE_KERNEL),
            Err(error) => match offline.bring_online() {
                Ok(()) => Outcome::Not(error),
                Err(_) => Outcome::Offline(offline),
            },
        }
    }

    fn take_online(self, offline: OfflineBlock, guard: &HotplugGuard, online: &CStr) -> Outcome {
        let callback = OnlinePageCallback::set(guard, self.pfns());
        let online = offline.write(online);
        let pages = callback.map(OnlinePageCallback::restore);

        match (pages, online) {
            // Another thread may have brought it online.
            (Ok(pages), _) if !pages.is_empty() => Outcome::Pages(pages),
            (_, Err(_)) => Outcome::Offline(offline),
            (Ok(_), Ok(())) => Outcome::Not(EINVAL),
            (Err(error), Ok(())) => Outcome::Not(error),
        }
    }
}

/// A memory block that was taken offline. The driver allocates nothing to bring it online; the
/// kernel may allocate.
pub(crate) struct OfflineBlock {
    state: StateFile,
    limits: Limits,
}

impl OfflineBlock {
    /// Makes one of the file at `path`.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn of_file(path: &CStr, limits: Limits) -> Result<Self> {
        let state = StateFile(WritableFile::open(path)?);

        Ok(Self { state, limits })
    }

    /// Brings the block online, in its previous zone. Does nothing if it is already online, or was
    /// unplugged. A block with a memory error stays offline: the kernel never brings it online.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub(crate) fn bring_online(&self) -> Result {
        self.write(ONLINE_KERNEL)
    }

    fn write(&self, online: &CStr) -> Result {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        if crate::rust::mm::memory::stays_offline() {
            return Err(EBUSY);
        }
        match self
            .state
            .write(online, self.limits.online, self.limits.busy)
        {
            Err(EINVAL | ENODEV) => Ok(()),
            Err(error) if error == has_memory_error() => {
                pr_warn!("a memory block has a memory error, and the kernel leaves it offline\n");
                Ok(())
            }
            result => result,
        }
    }
}

/// Returns the kernel's error for a block with a memory error, for which the kernel crate has no
/// name.
fn has_memory_error() -> Error {
    Error::from_errno(-(bindings::EHWPOISON as c_int))
}

/// The file with the state of a memory block.
struct StateFile(WritableFile);

impl StateFile {
    fn open(block: MemoryBlock) -> Result<Self> {
        let number = block.number().ok_or(EINVAL)?;
        let path = CString::try_from_fmt(fmt!("/sys/devices/system/memory/memory{number}/state"))?;

        Ok(Self(WritableFile::open(&path)?))
    }

    /// Writes a state. A signal interrupts the kernel after `limit`. While another thread takes
    /// memory offline or online, the kernel waits for some milliseconds, and asks for another try:
    /// until `busy` is over.
    fn write(&self, state: &CStr, limit: Msecs, busy: Delta) -> Result {
        let start = Instant::<Monotonic>::now();

        loop {
            match deadline::limit(limit, || self.0.write(state.to_bytes())) {
                Err(ERESTARTNOINTR) if start.elapsed() < busy => (),
                result => return result,
            }
        }
    }
}

/// The devices that plug and unplug memory: virtio-mem devices of any vendor.
pub(crate) const VIRTIO_MEM: DeviceId = DeviceId::any_vendor(bindings::VIRTIO_ID_MEM);

/// Returns whether the guest has a virtio-mem device. Its driver permanently sets the callback for
/// pages that come online, and there is only one.
pub(crate) fn has_virtio_mem(dev: &virtio::Device) -> bool {
    dev.bus_has_device(VIRTIO_MEM.device())
}
