// SPDX-License-Identifier: GPL-2.0

//! What all features of a device share.

pub(crate) mod attributes;
pub(crate) mod log_limit;
pub(crate) mod poison;
pub(crate) mod queues;
pub(crate) mod settings;
