// SPDX-License-Identifier: GPL-2.0

//! Tasks, threads, completions and wakeup sources.

pub(in crate::rust) mod deadline;
pub(crate) mod poll;
mod signal;
pub(crate) mod task;
pub(crate) mod thread;
pub(crate) mod wait;
pub(crate) mod wakeup;
