// SPDX-License-Identifier: GPL-2.0

//! The negotiated terms for the balloon's pages.

#![forbid(unsafe_code)]

use crate::{
    messages::balloon_page,
    rust::{
        virtio,
        virtio_balloon, //
    }, //
};

use kernel::device::Core;

/// The negotiated terms for inflating and deflating.
#[derive(Clone, Copy)]
pub(crate) struct Negotiated {
    /// `VIRTIO_BALLOON_F_MUST_TELL_HOST`.
    pub(crate) must_tell_host: bool,
    /// `VIRTIO_BALLOON_F_PAGE_SETS`.
    pub(crate) page_sets: bool,
}

impl Negotiated {
    /// Returns those of `dev`.
    pub(crate) fn of(dev: &virtio::Device<Core<'_>>) -> Self {
        Self {
            must_tell_host: dev.has_feature(virtio_balloon::F_MUST_TELL_HOST),
            page_sets: dev.has_feature(virtio_balloon::F_PAGE_SETS),
        }
    }

    /// Returns whether deflated pages may be used only after the device has used their message.
    pub(crate) fn notify_first(self) -> bool {
        self.must_tell_host || self.page_sets
    }

    /// Returns whether that also holds for a guest that has run out of memory, with deflate on OOM
    /// (docs/protocol.md, PS-D14).
    pub(crate) fn notify_first_out_of_memory(self) -> bool {
        self.must_tell_host
    }

    /// Returns the page frame number of the first kernel page that has no number in messages.
    pub(crate) fn end(self) -> u64 {
        match self.page_sets {
            true => u64::MAX,
            false => balloon_page::END,
        }
    }

    /// Returns whether the kernel page `pfn` has a number in messages.
    pub(crate) fn can_describe(self, pfn: u64) -> bool {
        pfn < self.end()
    }
}
