// SPDX-License-Identifier: GPL-2.0

//! Decisions that depend only on their arguments. Each has unit tests of its own.

#![forbid(unsafe_code)]

pub(crate) mod backoff;
pub(crate) mod growth;
pub(crate) mod liveness;
pub(crate) mod stop_reason;
pub(crate) mod target;
