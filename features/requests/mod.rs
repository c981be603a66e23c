// SPDX-License-Identifier: GPL-2.0

//! Host requests: unused pages, dropping caches.

#![forbid(unsafe_code)]

mod counters;
mod queue;
pub(crate) mod requests_feature;
mod task;
mod unused;
pub(crate) mod work;
