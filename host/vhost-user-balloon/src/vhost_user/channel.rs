// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The channel between the supervisor and its worker.
//!
//! The supervisor sends messages: at first [`START`], then [`SERVE`] for each front end. It closes its end to
//! end the worker. The worker sends bytes. One of them is [`CONFIG_CHANGED`]: the device must notify the front
//! end of a change of the configuration space. It also says that the worker has started the driver. The front
//! end sends a socket for such messages. But the vhost-user library neither shares the socket nor has a call for
//! this message. So the supervisor sends it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};

use log::warn;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::message::Message;

/// The version of the protocol between a supervisor and its worker, and of the snapshot for the next supervisor.
/// A program with another version does not start as a worker.
pub const VERSION: u32 = 1;

/// Get ready. The message carries the file with the balloon's state, and the listening control socket if there
/// is one. Its body is [`TRIAL`], or empty.
pub const START: u32 = 1;

/// The worker ends when it is ready, and another one has the state file. Earlier programs ignore it.
pub const TRIAL: &[u8] = &[1];

/// Serve the front end that connects to the socket in the message. The body has two numbers of 32 bits: the front
/// end's process id, or 0 if that is unknown, and 1 if the guest's driver continues.
pub const SERVE: u32 = 2;

/// The worker is ready.
pub const READY: u8 = 1;

/// The configuration space has changed. The worker sends it for each driver that it has started, and never without one.
pub const CONFIG_CHANGED: u8 = 2;

/// The worker's end of the channel.
#[derive(Debug)]
pub struct Channel {
    end: UnixStream,
    /// The front end's process id, or 0.
    vmm: Arc<AtomicI32>,
    /// Whether the driver that starts first continues with an earlier worker's device.
    continues: Arc<AtomicBool>,
}

impl Channel {
    /// A channel with this end.
    pub fn new(end: OwnedFd) -> Self {
        Self {
            end: end.into(),
            vmm: Arc::default(),
            continues: Arc::default(),
        }
    }

    /// Another handle of it.
    ///
    /// # Errors
    ///
    /// The system has no file descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            end: self.end.try_clone()?,
            vmm: Arc::clone(&self.vmm),
            continues: Arc::clone(&self.continues),
        })
    }

    /// Waits for a message of the supervisor.
    ///
    /// # Errors
    ///
    /// The supervisor has closed its end, or has ended.
    pub fn receive(&self) -> io::Result<Message> {
        Message::receive(&self.end)
    }

    /// Records the served front end, from the body of a message.
    pub fn set_vmm(&self, body: &[u8]) {
        let number = |at| {
            let bytes = body.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| i32::from_ne_bytes(*bytes))
        };
        self.vmm.store(number(0), SeqCst);
        self.continues.store(number(4) != 0, SeqCst);
    }

    /// Whether the driver that starts first continues with an earlier worker's device.
    pub fn continues(&self) -> bool {
        self.continues.load(SeqCst)
    }

    /// Records that a driver has started. The next one is a new driver.
    pub fn started(&self) {
        self.continues.store(false, SeqCst);
    }

    /// The front end's process id, if that is known.
    pub fn vmm(&self) -> Option<i32> {
        Some(self.vmm.load(SeqCst)).filter(|&pid| pid > 0)
    }

    /// Reports that the worker is ready.
    pub fn ready(&self) {
        self.send(READY);
    }

    /// Notifies the front end of a change of the configuration space.
    pub fn config_changed(&self) {
        self.send(CONFIG_CHANGED);
    }

    fn send(&self, byte: u8) {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.end.as_raw_fd(), &[byte], flags) {
            // A full channel already has a message of this kind.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => warn!("the supervisor cannot be reached: {error}"),
        }
    }
}
