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
//! A message of the guest passes through these modules. The vhost-user library sets up the queues and notifies
//! the [`device`]. A module in [`queues`] takes the messages of each queue and decodes them. [`memory`] has the
//! balloon's pages, detects memory that must not be discarded, and returns memory to the host. The daemon serves
//! commands of the host on the control socket (`control`).

pub mod budget;
mod control;
pub mod counters;
pub mod device;
pub mod memory;
pub mod options;
pub mod queues;
pub mod supervisor;
pub mod sync;
pub mod vhost_user;
pub mod virtio;
pub mod worker;

#[cfg(test)]
mod testing;
