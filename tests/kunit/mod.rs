// SPDX-License-Identifier: GPL-2.0

//! KUnit suites. They run when the module is loaded into a kernel that has KUnit built in.
//!
//! Asserts stand in the tests only: in a function that is not a test they would be `core`'s, and
//! stop the kernel. Helpers return errors.

#![forbid(unsafe_code)]

mod backoff;
mod batch;
mod bitmap;
mod budget;
mod buffer;
mod device;
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
mod stats;
mod target;
