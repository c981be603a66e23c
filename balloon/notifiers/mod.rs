// SPDX-License-Identifier: GPL-2.0

//! The kernel's notifiers that call the balloon.

#![forbid(unsafe_code)]

mod offline;
mod oom;
