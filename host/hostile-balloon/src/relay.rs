// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A relay between the front end and the vhost-user library: the library does not share the socket for the
//! device's own messages.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use log::{info, warn};
use vhost::vhost_user::message::BackendReq;
use vhost_user_balloon::vhost_user::message::{Message, request};

/// How long the front end may take to acknowledge a change.
const PATIENCE: Duration = Duration::from_secs(1);

/// The front end's socket for the device's own messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Channel(Arc<OnceLock<UnixStream>>);

impl Channel {
    /// Announces a change of the configuration space, and waits until the front end has
    /// acknowledged it.
    ///
    /// QEMU 11.1 crashes if it receives the message after the driver has stopped the device: it accesses the
    /// device's state, which is gone. So no such message may be in flight then.
    pub(crate) fn config_changed(&self) {
        /// A header, and a word with the result.
        const ANSWER: usize = 20;
        let Some(mut socket) = self.0.get() else {
            return;
        };
        let mut change = Message::new(BackendReq::CONFIG_CHANGE_MSG as u32, &[], Vec::new());
        change.set_wants_answer(true);
        let told = socket
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| change.send(socket))
            .and_then(|()| socket.read_exact(&mut [0; ANSWER]));
        if let Err(error) = told {
            warn!("the front end does not acknowledge a change: {error}");
        }
    }
}

/// Forwards all messages, in both directions, until one of the sides disconnects.
///
/// # Errors
///
/// The system has no file descriptors.
pub(crate) fn start(front: UnixStream, back: UnixStream, channel: Channel) -> io::Result<()> {
    let (to_front, from_back) = (front.try_clone()?, back.try_clone()?);
    thread::spawn(move || {
        let error = loop {
            let message = match Message::receive(&front) {
                Ok(message) => message,
                Err(error) => break error,
            };
            if let (request::SET_BACKEND_REQ_FD, [socket]) =
                (message.request(), message.descriptors())
            {
                match socket.try_clone() {
                    // There is one for each front end.
                    Ok(socket) => drop(channel.0.set(socket.into())),
                    Err(error) => warn!("changes cannot be announced: {error}"),
                }
            }
            if let Err(error) = message.send(&back) {
                break error;
            }
        };
        info!("the connection has ended: {error}");
        // This disconnects the other side.
        let _ = back.shutdown(std::net::Shutdown::Both);
    });
    thread::spawn(move || {
        while let Ok(message) = Message::receive(&from_back) {
            if message.send(&to_front).is_err() {
                break;
            }
        }
    });
    Ok(())
}
