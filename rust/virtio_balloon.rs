// SPDX-License-Identifier: GPL-2.0

//! The balloon's wire format, from the C header that defines it.
//!
//! C headers: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h),
//! and `uapi/linux/virtio_balloon_ext.h` of this repository.

use crate::rust::{
    bindings,
    virtio::{
        ByteOrder,
        DeviceId,
        FeatureBit,
        Field, //
    }, //
};

use core::mem::offset_of;
use kernel::transmute::{
    AsBytes,
    FromBytes, //
};

/// The devices: memory balloons of any vendor.
pub(crate) const DEVICE_ID: DeviceId = DeviceId::any_vendor(bindings::VIRTIO_ID_BALLOON);

/// A feature that the driver knows.
pub(crate) struct Known {
    pub(crate) feature: FeatureBit,
    /// Its name in the log.
    pub(crate) words: &'static str,
    /// Its field of the configuration space.
    pub(crate) field: Option<Field<u32>>,
    /// Whether it belongs to the extended protocol (docs/protocol.md).
    pub(crate) is_extension: bool,
}

/// Defines the features and the list of all features, so that each defined feature is negotiated.
macro_rules! features {
    ($(
        $(#[$doc:meta])*
        $name:ident = $bit:ident, $words:literal, $field:expr, $is_extension:literal;
    )*) => {
        $(
            $(#[$doc])*
            pub(crate) const $name: FeatureBit = FeatureBit::new::<{ bindings::$bit }>();
        )*

        /// All features that the driver knows.
        pub(crate) const KNOWN: &[Known] = &[$(Known {
            feature: $name,
            words: $words,
            field: $field,
            is_extension: $is_extension,
        }),*];
    };
}

features! {
    /// Pages may be used only after the device has used the message about them.
    F_MUST_TELL_HOST = VIRTIO_BALLOON_F_MUST_TELL_HOST, "must tell host", None, false;
    /// The device accepts statistics.
    F_STATS_VQ = VIRTIO_BALLOON_F_STATS_VQ, "statistics", None, false;
    /// The driver may deflate below the target when the guest runs out of memory.
    F_DEFLATE_ON_OOM = VIRTIO_BALLOON_F_DEFLATE_ON_OOM, "deflate on OOM", None, false;
    /// The device requests hints of free pages, so that a VM migration can omit them.
    F_FREE_PAGE_HINT = VIRTIO_BALLOON_F_FREE_PAGE_HINT, "free page hinting", Some(HINT_ID), false;
    /// The device needs the value of free pages.
    F_PAGE_POISON = VIRTIO_BALLOON_F_PAGE_POISON, "page poison", Some(POISON_VAL), false;
    /// The device accepts reports of free pages.
    F_REPORTING = VIRTIO_BALLOON_F_REPORTING, "free page reporting", None, false;
    /// The device accepts the reason why the balloon is below the target.
    F_STOP_REASON = VIRTIO_BALLOON_F_STOP_REASON, "stop reasons", Some(STOP_REASON), true;
    /// The device accepts statistics that it has not requested.
    F_PRESSURE = VIRTIO_BALLOON_F_PRESSURE, "pressure notices", None, true;
    /// The device accepts page sets instead of arrays of page frame numbers.
    F_PAGE_SETS = VIRTIO_BALLOON_F_PAGE_SETS, "page sets", None, true;
    /// The device accepts the size and the stop reason in messages.
    F_STATUS = VIRTIO_BALLOON_F_STATUS, "status messages", None, true;
    /// The device sends host requests.
    F_HOST_REQUESTS = VIRTIO_BALLOON_F_HOST_REQUESTS, "host requests", None, true;
}

/// The binary logarithm of the size of a balloon page in bytes.
pub(crate) const PFN_SHIFT: u32 = bindings::VIRTIO_BALLOON_PFN_SHIFT;

/// The device's target, in balloon pages. Little-endian on legacy devices, too.
pub(crate) const NUM_PAGES: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_config, num_pages));

/// The balloon size, in balloon pages. Little-endian on legacy devices, too.
pub(crate) const ACTUAL: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_config, actual));

/// The id of the current round of hints, or [`HINT_STOP`] or [`HINT_DONE`]. Little-endian on legacy
/// devices, too.
pub(crate) const HINT_ID: Field<u32> = Field::new(offset_of!(
    bindings::virtio_balloon_config,
    __bindgen_anon_1
));

/// Hints are off. As a message of the driver: the end of the round.
pub(crate) const HINT_STOP: u32 = bindings::VIRTIO_BALLOON_CMD_ID_STOP;

/// Hints are off, and hinted memory may be used.
pub(crate) const HINT_DONE: u32 = bindings::VIRTIO_BALLOON_CMD_ID_DONE;

/// The value of each word of free pages. Little-endian on legacy devices, too.
pub(crate) const POISON_VAL: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_config, poison_val));

/// Why the balloon is below the target: one of [`stop_reason`]. An extension.
pub(crate) const STOP_REASON: Field<u32> =
    Field::new(offset_of!(bindings::virtio_balloon_ext_config, stop_reason));

/// The values of [`STOP_REASON`].
pub(crate) mod stop_reason {
    use super::bindings;

    /// It is not below the target, or still growing.
    pub(crate) const NONE: u32 = bindings::VIRTIO_BALLOON_STOP_REASON_NONE;
    /// The available memory would fall below the reserve.
    pub(crate) const FLOOR: u32 = bindings::VIRTIO_BALLOON_STOP_REASON_FLOOR;
    /// No memory could be allocated.
    pub(crate) const NO_MEMORY: u32 = bindings::VIRTIO_BALLOON_STOP_REASON_NO_MEMORY;
    /// The guest ran out of memory recently.
    pub(crate) const AFTER_OOM: u32 = bindings::VIRTIO_BALLOON_STOP_REASON_AFTER_OOM;
    /// The guest's administrator has turned ballooning off.
    pub(crate) const EXCLUDED: u32 = bindings::VIRTIO_BALLOON_STOP_REASON_EXCLUDED;
}

/// A request of the device. Little-endian.
pub(crate) use bindings::virtio_balloon_request as Request;

// SAFETY: The struct consists of integers, which may have any value.
unsafe impl FromBytes for Request {}

/// The completion of an answer. Little-endian.
pub(crate) use bindings::virtio_balloon_completion as Completion;

// SAFETY: The struct consists of integers, and has no padding.
unsafe impl AsBytes for Completion {}

/// The balloon's size and stop reason. Little-endian.
pub(crate) use bindings::virtio_balloon_status as Status;

impl Status {
    /// Makes the status of a balloon of `actual` balloon pages, with one of [`stop_reason`].
    pub(crate) fn new(actual: u32, stop_reason: u32) -> Self {
        Self {
            command: (bindings::VIRTIO_BALLOON_STATUS as u16).to_le(),
            reserved: 0,
            flags: 0,
            request_id: 0,
            actual: actual.to_le(),
            stop_reason: stop_reason.to_le(),
        }
    }
}

// SAFETY: The struct consists of integers, and has no padding.
unsafe impl AsBytes for Status {}

/// The values of the fields of a [`Request`] and of a [`Completion`].
pub(crate) mod request {
    use super::bindings;

    /// The command: list pages that were unused a moment ago.
    pub(crate) const UNUSED_SKIP: u16 = bindings::VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP as u16;
    /// The command: allocate and list unused pages, until the device has used the message.
    pub(crate) const UNUSED_DISCARD: u16 = bindings::VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD as u16;
    /// The command: drop caches.
    pub(crate) const DROP_CACHES: u16 = bindings::VIRTIO_BALLOON_REQUEST_DROP_CACHES as u16;
    /// The command: cancel a request.
    pub(crate) const CANCEL: u16 = bindings::VIRTIO_BALLOON_REQUEST_CANCEL as u16;
    /// The command of the last message of an answer.
    pub(crate) const COMPLETION: u16 = bindings::VIRTIO_BALLOON_COMPLETION as u16;

    /// The page cache.
    pub(crate) const CACHES_PAGES: u32 = bindings::VIRTIO_BALLOON_CACHES_PAGES;
    /// The slab caches of names and inodes.
    pub(crate) const CACHES_SLAB: u32 = bindings::VIRTIO_BALLOON_CACHES_SLAB;

    /// The status: done.
    pub(crate) const COMPLETE: u8 = bindings::VIRTIO_BALLOON_COMPLETION_COMPLETE as u8;
    /// The status: incomplete.
    pub(crate) const ABORTED: u8 = bindings::VIRTIO_BALLOON_COMPLETION_ABORTED as u8;
    /// The status: incomplete, because of a cancel.
    pub(crate) const CANCELLED: u8 = bindings::VIRTIO_BALLOON_COMPLETION_CANCELLED as u8;
    /// The status: the driver does not know the command.
    pub(crate) const UNSUPPORTED: u8 = bindings::VIRTIO_BALLOON_COMPLETION_UNSUPPORTED as u8;
    /// The status: a field has no legal value.
    pub(crate) const MALFORMED: u8 = bindings::VIRTIO_BALLOON_COMPLETION_MALFORMED as u8;
    /// The status: there is no such request to cancel.
    pub(crate) const UNKNOWN_ID: u8 = bindings::VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID as u8;
}

/// The header of a message that lists pages. Little-endian.
pub(crate) use bindings::virtio_balloon_page_set as PageSet;

// SAFETY: The struct consists of integers, and has no padding.
unsafe impl AsBytes for PageSet {}

/// The values of the fields of a [`PageSet`].
pub(crate) mod page_set {
    use super::bindings;

    /// The command: inflate.
    pub(crate) const INFLATE: u16 = bindings::VIRTIO_BALLOON_PAGE_SET_INFLATE as u16;
    /// The command: deflate.
    pub(crate) const DEFLATE: u16 = bindings::VIRTIO_BALLOON_PAGE_SET_DEFLATE as u16;
    /// The encoding as ranges.
    pub(crate) const RANGES: u8 = bindings::VIRTIO_BALLOON_PAGE_SET_RANGES as u8;
    /// The encoding as a bitmap.
    pub(crate) const BITMAP: u8 = bindings::VIRTIO_BALLOON_PAGE_SET_BITMAP as u8;
    /// The flag of a message that is not the last one of its set.
    pub(crate) const MORE: u32 = bindings::VIRTIO_BALLOON_PAGE_SET_MORE;
    /// The length of the longest message in bytes, header included.
    pub(crate) const MAX_BYTES: usize = bindings::VIRTIO_BALLOON_PAGE_SET_MAX_BYTES as usize;
    /// The number of bits of a range for the number of pages.
    pub(crate) const COUNT_BITS: u32 = bindings::VIRTIO_BALLOON_PAGE_SET_COUNT_BITS;
}

/// A number about the guest's memory, in the device's byte order.
pub(crate) use bindings::virtio_balloon_stat as Stat;

impl Stat {
    /// Makes the statistic `tag` with the value `value`.
    pub(crate) fn new(tag: u16, value: u64, order: ByteOrder) -> Self {
        Self {
            tag: order.to_device16(tag),
            val: order.to_device64(value),
        }
    }
}

// SAFETY: The struct is packed and consists of integers.
unsafe impl AsBytes for Stat {}

/// The tags of the statistics. Amounts of memory are in bytes.
pub(crate) mod stat {
    use super::bindings;

    /// The first tag that the kernel's header does not have.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) const END: u16 = bindings::VIRTIO_BALLOON_S_NR as u16;

    /// Memory swapped in, since the guest booted.
    pub(crate) const SWAP_IN: u16 = bindings::VIRTIO_BALLOON_S_SWAP_IN as u16;
    /// Memory swapped out, since the guest booted.
    pub(crate) const SWAP_OUT: u16 = bindings::VIRTIO_BALLOON_S_SWAP_OUT as u16;
    /// Page faults that needed I/O, since the guest booted.
    pub(crate) const MAJFLT: u16 = bindings::VIRTIO_BALLOON_S_MAJFLT as u16;
    /// Page faults, since the guest booted.
    pub(crate) const MINFLT: u16 = bindings::VIRTIO_BALLOON_S_MINFLT as u16;
    /// Free memory.
    pub(crate) const MEMFREE: u16 = bindings::VIRTIO_BALLOON_S_MEMFREE as u16;
    /// All memory.
    pub(crate) const MEMTOT: u16 = bindings::VIRTIO_BALLOON_S_MEMTOT as u16;
    /// Memory that is available without swapping.
    pub(crate) const AVAIL: u16 = bindings::VIRTIO_BALLOON_S_AVAIL as u16;
    /// Page cache.
    pub(crate) const CACHES: u16 = bindings::VIRTIO_BALLOON_S_CACHES as u16;
    /// Huge pages allocated, since the guest booted.
    pub(crate) const HTLB_PGALLOC: u16 = bindings::VIRTIO_BALLOON_S_HTLB_PGALLOC as u16;
    /// Failed allocations of huge pages, since the guest booted.
    pub(crate) const HTLB_PGFAIL: u16 = bindings::VIRTIO_BALLOON_S_HTLB_PGFAIL as u16;
    /// OOM kills, since the guest booted.
    pub(crate) const OOM_KILL: u16 = bindings::VIRTIO_BALLOON_S_OOM_KILL as u16;
    /// Allocations that waited for reclaim, since the guest booted.
    pub(crate) const ALLOC_STALL: u16 = bindings::VIRTIO_BALLOON_S_ALLOC_STALL as u16;
    /// Memory scanned by background reclaim, since the guest booted.
    pub(crate) const ASYNC_SCAN: u16 = bindings::VIRTIO_BALLOON_S_ASYNC_SCAN as u16;
    /// Memory scanned by direct reclaim, since the guest booted.
    pub(crate) const DIRECT_SCAN: u16 = bindings::VIRTIO_BALLOON_S_DIRECT_SCAN as u16;
    /// Memory reclaimed in the background, since the guest booted.
    pub(crate) const ASYNC_RECLAIM: u16 = bindings::VIRTIO_BALLOON_S_ASYNC_RECLAIM as u16;
    /// Memory reclaimed by direct reclaim, since the guest booted.
    pub(crate) const DIRECT_RECLAIM: u16 = bindings::VIRTIO_BALLOON_S_DIRECT_RECLAIM as u16;
}
