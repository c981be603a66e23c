// SPDX-License-Identifier: GPL-2.0

//! Host requests: unused pages, dropping caches.

#![forbid(unsafe_code)]

mod counters;
pub(crate) mod feature;
mod queue;
mod task;
mod unused;
mod work;
