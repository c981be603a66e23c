// SPDX-License-Identifier: GPL-2.0

//! The features of a device other than the balloon, each with its own queue and task.

#![forbid(unsafe_code)]

pub(crate) mod budget;
pub(crate) mod hinting;
pub(crate) mod reporting;
pub(crate) mod requests;
pub(crate) mod stats;
