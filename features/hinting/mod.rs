// SPDX-License-Identifier: GPL-2.0

//! Free page hinting.

pub(crate) mod feature;
mod task;
pub(crate) mod worker;
