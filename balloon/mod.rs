// SPDX-License-Identifier: GPL-2.0

//! The balloon: from the host's target to pages in messages.

pub(crate) mod backoff;
pub(crate) mod control_loop;
pub(crate) mod deflate;
pub(crate) mod inflate;
pub(crate) mod migration;
pub(crate) mod stop_reason;
pub(crate) mod target;
