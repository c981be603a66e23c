// SPDX-License-Identifier: GPL-2.0

//! The balloon: from the host's target to pages in messages.

pub(crate) mod backoff;
mod control_loop;
mod deflate;
pub(crate) mod feature;
mod inflate;
pub(crate) mod liveness;
pub(crate) mod migration;
mod migration_reports;
mod offline;
pub(crate) mod oom;
mod quiesce;
pub(crate) mod resize;
pub(crate) mod state;
mod status;
pub(crate) mod stop_reason;
pub(crate) mod target;
