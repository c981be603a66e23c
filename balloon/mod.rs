// SPDX-License-Identifier: GPL-2.0

//! The balloon: from the host's target to pages in messages.

#![forbid(unsafe_code)]

pub(crate) mod balloon_feature;
mod config_space;
mod control_loop;
mod events;
pub(crate) mod migration;
mod notifiers;
pub(crate) mod policy;
mod progress;
mod queues;
pub(crate) mod resize;
pub(crate) mod state;
mod status;
mod teardown;
