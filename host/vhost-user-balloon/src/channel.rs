// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From the process that has the device to the one that keeps the VMM's connection.
//!
//! The device has to tell the front end that the configuration space has changed. The front end sends a
//! socket for such messages, but the vhost-user library keeps that to itself and has no call for this
//! message. So the process through which all of the front end's messages go sends it.

use std::os::fd::{AsRawFd, OwnedFd};

use log::warn;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

/// The device's end of a stream in which each byte stands for a change.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// A channel that this is the end of.
    pub fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    /// Tells the front end that the configuration space has changed.
    pub fn config_changed(&self) {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.0.as_raw_fd(), &[0], flags) {
            // One that is full says so already.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => {
                warn!("cannot tell the VMM that the configuration has changed: {error}");
            }
        }
    }
}
