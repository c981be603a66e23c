// SPDX-License-Identifier: GPL-2.0

//! KUnit suites. They run when the module is loaded into a kernel with KUnit built in.
//!
//! Only tests contain asserts: in other functions they would be those of `core`, and stop the
//! kernel. Helpers return errors.

#![forbid(unsafe_code)]

mod backoff;
mod batch;
mod bitmap;
mod budget;
mod buffer;
mod cleanup;
mod device;
mod fake_balloon;
mod free_pages;
mod hinting;
mod host_requests;
mod liveness;
mod memory;
mod memory_blocks;
mod migration;
mod pages;
mod poll;
mod quiesce;
mod range_stack;
mod right;
mod stats;
mod target;
