// SPDX-License-Identifier: GPL-2.0

//! Contiguous ranges of memory, allocated in place. The kernel drains its lists for that.

pub(crate) mod contig_pages;
pub(crate) mod drain;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod page_list_tests;
