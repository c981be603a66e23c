// SPDX-License-Identifier: GPL-2.0

//! Host requests: unused pages, dropping caches.

mod counters;
pub(crate) mod feature;
mod queue;
mod task;
mod unused;
mod work;
