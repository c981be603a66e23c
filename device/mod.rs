// SPDX-License-Identifier: GPL-2.0

//! Shared parts of all features of a device.

#![forbid(unsafe_code)]

pub(crate) mod announced;
pub(crate) mod attributes;
pub(crate) mod bound_device;
pub(crate) mod driver;
pub(crate) mod feature;
pub(crate) mod log_limit;
pub(crate) mod negotiation;
pub(crate) mod oom_order;
pub(crate) mod poison;
pub(crate) mod queues;
pub(crate) mod settings;
pub(crate) mod teardown;
pub(crate) mod timeouts;
