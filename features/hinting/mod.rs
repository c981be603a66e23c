// SPDX-License-Identifier: GPL-2.0

//! Free page hinting.

#![forbid(unsafe_code)]

pub(crate) mod hinting_feature;
mod task;
pub(crate) mod worker;
