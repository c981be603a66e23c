// SPDX-License-Identifier: GPL-2.0

//! What the kernel calls the balloon for.

mod offline;
pub(crate) mod oom;
