// SPDX-License-Identifier: GPL-2.0

//! Messages that describe pages to the device.

#![forbid(unsafe_code)]

pub(crate) mod balloon_page;
pub(crate) mod message;
pub(crate) mod negotiated;
pub(crate) mod page_sets;
pub(crate) mod pfns;
pub(crate) mod ranges;
