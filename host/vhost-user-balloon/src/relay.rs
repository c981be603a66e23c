// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between the front end and the library that speaks vhost-user with it.
//!
//! The device has to tell the front end that the configuration space has changed. The front end sends a
//! socket for such messages, but the library keeps that to itself and has no call for this message. So the
//! front end's connection is relayed to the library, message by message, and a copy of the socket is kept
//! on the way.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use log::{debug, warn};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// The size of a message's header in bytes: request, flags, and the size of the rest.
const HEADER: usize = 12;

/// How long the rest of a message may be, in bytes.
const MAX_BODY: usize = 4096;

/// How many file descriptors may come with a message.
const MAX_DESCRIPTORS: usize = 32;

/// The front end's request with the socket for the device's own messages.
const SET_BACKEND_REQ_FD: u32 = 21;

/// The device's message that the configuration space has changed, in version 1 of the protocol.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// How long the front end may take to make room for a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// The socket for the device's own messages, if a front end has sent one.
#[derive(Default)]
pub struct Channel(Mutex<Option<UnixStream>>);

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Channel")
    }
}

impl Channel {
    fn set(&self, socket: Option<UnixStream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    /// Tells the front end that the configuration space has changed.
    pub fn config_changed(&self) {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let message = CONFIG_CHANGE.map(u32::to_ne_bytes).concat();
        let sent = match socket.as_mut() {
            Some(socket) => socket.write_all(&message),
            None => Err(ErrorKind::NotConnected.into()),
        };
        if let Err(error) = sent {
            warn!("cannot tell the VMM that the configuration has changed: {error}");
        }
    }
}

/// Relays until one of the sides is gone.
pub fn relay(front: &UnixStream, back: &UnixStream, channel: &Channel) {
    thread::scope(|scope| {
        scope.spawn(|| {
            // What the library sends has no file descriptors, and its messages need not be told apart.
            // The end is told by the other direction.
            let (mut from, mut to) = (back, front);
            let _ = io::copy(&mut from, &mut to);
            let _ = front.shutdown(Shutdown::Both);
        });
        let end = forward(front, back, channel);
        debug!("the front end is gone: {end}");
        channel.set(None);
        // One that is gone already needs no more.
        let _ = front.shutdown(Shutdown::Both);
        let _ = back.shutdown(Shutdown::Both);
    });
}

/// Forwards messages to the library. Returns why there are no more.
fn forward(front: &UnixStream, back: &UnixStream, channel: &Channel) -> io::Error {
    let mut message = Vec::with_capacity(HEADER + MAX_BODY);
    loop {
        if let Err(error) = forward_one(front, back, channel, &mut message) {
            return error;
        }
    }
}

fn forward_one(
    mut front: &UnixStream,
    mut back: &UnixStream,
    channel: &Channel,
    message: &mut Vec<u8>,
) -> io::Result<()> {
    message.clear();
    message.resize(HEADER, 0);
    let descriptors = receive(front, message)?;
    let (request, size) = match message.as_slice() {
        [a, b, c, d, _, _, _, _, e, f, g, h] => (
            u32::from_ne_bytes([*a, *b, *c, *d]),
            u32::from_ne_bytes([*e, *f, *g, *h]),
        ),
        _ => return Err(ErrorKind::InvalidData.into()),
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > MAX_BODY {
        return Err(ErrorKind::InvalidData.into());
    }
    message.resize(HEADER + size, 0);
    front.read_exact(message.get_mut(HEADER..).unwrap_or_default())?;

    if request == SET_BACKEND_REQ_FD {
        if let [socket] = descriptors.as_slice() {
            let socket = UnixStream::from(socket.try_clone()?);
            socket.set_write_timeout(Some(SEND_TIMEOUT))?;
            channel.set(Some(socket));
        }
    }

    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights };
    let sent = sendmsg::<UnixAddr>(
        back.as_raw_fd(),
        &[IoSlice::new(message)],
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    back.write_all(message.get(sent..).unwrap_or_default())
}

/// Fills a header, and returns the file descriptors that came with it.
fn receive(mut front: &UnixStream, header: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let (received, descriptors) = {
        let mut slices = [IoSliceMut::new(header)];
        let message = recvmsg::<UnixAddr>(
            front.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for this process, and nobody else
                // has seen their numbers.
                descriptors.extend(raw.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, descriptors)
    };
    if received == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    front.read_exact(header.get_mut(received..).unwrap_or_default())?;
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_file;
    use std::os::unix::fs::FileExt;

    fn message(request: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(body.len()).unwrap();
        [&[request, 1, size].map(u32::to_ne_bytes).concat(), body].concat()
    }

    fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let flags = MsgFlags::empty();
        sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &rights,
            flags,
            None,
        )
        .unwrap();
    }

    /// Has a relay between two sockets while `test` runs.
    fn with_relay(test: impl FnOnce(UnixStream, UnixStream, &Channel)) {
        let (outer, front) = UnixStream::pair().unwrap();
        let (inner, back) = UnixStream::pair().unwrap();
        let channel = Channel::default();
        thread::scope(|scope| {
            scope.spawn(|| relay(&front, &back, &channel));
            test(outer, inner, &channel);
        });
    }

    #[test]
    fn descriptors_stay_with_their_messages() {
        with_relay(|mut outer, mut inner, _| {
            let files = [memory_file(1), memory_file(1)];
            files[0].write_all_at(b"0", 0).unwrap();
            files[1].write_all_at(b"1", 0).unwrap();
            let (first, second) = (message(5, b"abc"), message(6, b""));
            outer.write_all(&message(1, b"")).unwrap();
            send(&outer, &first, &[files[0].as_raw_fd()]);
            send(&outer, &second, &[files[1].as_raw_fd()]);

            let mut header = [0; HEADER];
            assert!(receive(&inner, &mut header).unwrap().is_empty());
            for (place, expected) in [first, second].into_iter().enumerate() {
                let descriptors = receive(&inner, &mut header).unwrap();
                let [file] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
                let mut content = [0];
                std::fs::File::from(file)
                    .read_exact_at(&mut content, 0)
                    .unwrap();
                assert_eq!(usize::from(content[0] - b'0'), place);
                let mut body = vec![0; expected.len() - HEADER];
                inner.read_exact(&mut body).unwrap();
                assert_eq!([&header[..], &body].concat(), expected);
            }

            inner.write_all(b"answer").unwrap();
            let mut answer = [0; 6];
            outer.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
        });
    }

    #[test]
    fn changes_go_to_the_socket_that_was_sent() {
        with_relay(|outer, inner, channel| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            send(
                &outer,
                &message(SET_BACKEND_REQ_FD, b""),
                &[theirs.as_raw_fd()],
            );
            let mut header = [0; HEADER];
            assert_eq!(receive(&inner, &mut header).unwrap().len(), 1);
            channel.config_changed();
            let mut change = [0; HEADER];
            ours.read_exact(&mut change).unwrap();
            assert_eq!(change[..], [2_u32, 1, 0].map(u32::to_ne_bytes).concat());
        });
    }

    #[test]
    fn an_endless_message_ends_the_connection() {
        with_relay(|mut outer, mut inner, _| {
            outer
                .write_all(&[1_u32, 1, u32::MAX].map(u32::to_ne_bytes).concat())
                .unwrap();
            assert_eq!(inner.read(&mut [0; 16]).unwrap(), 0);
            assert_eq!(outer.read(&mut [0; 16]).unwrap(), 0);
        });
    }
}
