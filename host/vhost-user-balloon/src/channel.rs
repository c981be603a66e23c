// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between the process that has the device and the one that keeps the VMM's connection.
//!
//! The device has to tell the front end that the configuration space has changed. The front end sends a
//! socket for such messages, but the vhost-user library keeps that to itself and has no call for this
//! message. So the process through which all of the front end's messages go sends it.

use std::os::fd::{AsRawFd, OwnedFd};

use log::warn;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

/// The device's end of a stream. Each byte that it sends stands for a change, and what it receives are the
/// numbers of the processes of front ends, each of them before its front end is let through.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// A channel that this is the end of.
    pub fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    /// The number of the front end's process, if the other process has sent it, and knows it.
    pub fn vmm(&self) -> Option<i32> {
        let mut bytes = [0; 256];
        let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
        // The last one is connected.
        let last = bytes.get(..length)?.chunks_exact(size_of::<i32>()).last()?;
        Some(i32::from_ne_bytes(*last.first_chunk()?)).filter(|&pid| pid > 0)
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
