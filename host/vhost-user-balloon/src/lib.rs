// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vhost-user device daemon that is a virtio balloon (specification, clause 5.5), with the extension of
//! `uapi/linux/virtio_balloon_ext.h`.
//!
//! Each VM has a daemon of its own, which serves one front end at a time. So each can have a user of its
//! own, and a crash, a leak or a busy guest affects only that VM.
//!
//! It has two processes: the [`supervisor`] holds the VMM's connection, and is the parent of the
//! [`worker`], which implements the device. Both can crash or be replaced while the guest runs.
//!
//! A message passes through these modules. The vhost-user library sets up the queues and notifies
//! [`device`]. [`queue`] takes the messages. [`inflate`], [`deflate`], [`stats`], [`hinting`],
//! [`reporting`] and [`answers`] handle them, and [`pages`] decodes lists of pages. [`hazard`] detects
//! memory that must not be discarded, [`balloon`] has the guest's memory and its balloon, and [`discard`]
//! returns memory to the host.

pub mod answers;
pub mod balloon;
mod bitmap;
pub mod channel;
pub mod config;
mod control;
pub mod counters;
pub mod deflate;
pub mod device;
pub mod discard;
pub mod features;
pub mod floor;
pub mod hazard;
pub mod hinting;
pub mod inflate;
pub mod kept;
pub mod kind;
pub mod message;
pub mod metrics;
pub mod options;
pub mod page_map;
pub mod pages;
pub mod queue;
pub mod reporting;
pub mod requests;
pub mod sandbox;
pub mod state;
pub mod stats;
pub mod supervisor;
mod sweep;
pub mod sync;
mod timer;
mod work;
pub mod worker;

#[cfg(test)]
mod testing;
