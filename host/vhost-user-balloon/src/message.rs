// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of the vhost-user protocol, as far as one has to know them to hand them on: a header, the rest,
//! and the file descriptors that came with them.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The size of a message's header in bytes: request, flags, and the size of the rest.
const HEADER: usize = 12;

/// How long the rest of a message may be, in bytes.
const MAX_BODY: usize = 4096;

/// How many file descriptors may come with a message, and how many the kernel lets anybody send at once. Where
/// there is no room for all of them, those that there is room for would be left open.
const MAX_DESCRIPTORS: usize = 32;
const MOST_DESCRIPTORS: usize = 253;

/// The space that these take beside a message, in bytes.
const SPACE: usize = rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS));

/// The front end's requests that mean something here.
pub mod request {
    /// The memory as a whole.
    pub const SET_MEM_TABLE: u32 = 5;
    /// How many descriptors a queue has.
    pub const SET_VRING_NUM: u32 = 8;
    /// Where a queue's rings are, in the front end's addresses.
    pub const SET_VRING_ADDR: u32 = 9;
    /// The index from which on a queue's available ring is to be read.
    pub const SET_VRING_BASE: u32 = 10;
    /// The end of a queue, answered with that index.
    pub const GET_VRING_BASE: u32 = 11;
    /// The event through which the guest tells of messages in a queue.
    pub const SET_VRING_KICK: u32 = 12;
    /// The event through which the guest is told of answers.
    pub const SET_VRING_CALL: u32 = 13;
    /// The event for errors of a queue.
    pub const SET_VRING_ERR: u32 = 14;
    /// What the protocol can beyond its basics.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Whether a queue is in use.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// The socket for the device's own messages.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// A part of the configuration space.
    pub const GET_CONFIG: u32 = 24;
    /// What the guest has written into it.
    pub const SET_CONFIG: u32 = 25;
    /// A part of the memory.
    pub const ADD_MEM_REG: u32 = 37;
    /// A part of the memory that is gone.
    pub const REM_MEM_REG: u32 = 38;
}

/// A message.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    /// Receives a message, and never a part of the next one.
    ///
    /// # Errors
    ///
    /// The other side is gone, or does not speak the protocol.
    pub fn receive(mut from: &UnixStream) -> io::Result<Self> {
        let mut bytes = vec![0; HEADER];
        let descriptors = receive(from, &mut bytes)?;
        let mut message = Self { bytes, descriptors };
        let size = message.word(8).unwrap_or(u32::MAX);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_BODY {
            return Err(ErrorKind::InvalidData.into());
        }
        message.bytes.resize(HEADER + size, 0);
        from.read_exact(message.bytes.get_mut(HEADER..).unwrap_or_default())?;
        Ok(message)
    }

    /// Sends it.
    ///
    /// # Errors
    ///
    /// The other side is gone.
    pub fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let rights: Vec<BorrowedFd> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&rights)) {
            return Err(ErrorKind::InvalidData.into());
        }
        let parts = [IoSlice::new(&self.bytes)];
        let sent = retry_on_intr(|| sendmsg(to, &parts, &mut control, SendFlags::NOSIGNAL))?;
        to.write_all(self.bytes.get(sent..).unwrap_or_default())
    }

    /// What it asks for.
    pub fn request(&self) -> u32 {
        self.word(0).unwrap_or_default()
    }

    /// Whether it wants to be answered: some requests always do, others when this bit is set.
    pub fn wants_answer(&self) -> bool {
        const NEED_REPLY: u32 = 1 << 3;
        self.word(4).unwrap_or_default() & NEED_REPLY != 0
    }

    /// What is after the header.
    pub fn body(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn body_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(HEADER..).unwrap_or_default()
    }

    /// The file descriptors that came with it.
    pub fn descriptors(&self) -> &[OwnedFd] {
        &self.descriptors
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    }
}

/// Fills a header, and returns the file descriptors that came with it.
fn receive(mut from: &UnixStream, header: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(header)];
        recvmsg(from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?
    .bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(ErrorKind::InvalidData.into());
    }
    from.read_exact(header.get_mut(received..).unwrap_or_default())?;
    Ok(descriptors)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::memory_file;
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, read};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// A message with this body and these files.
    pub(crate) fn message(request: u32, body: &[u8], descriptors: Vec<OwnedFd>) -> Message {
        let size = u32::try_from(body.len()).unwrap();
        Message {
            bytes: [&[request, 1, size].map(u32::to_ne_bytes).concat(), body].concat(),
            descriptors,
        }
    }

    #[test]
    fn descriptors_stay_with_their_messages() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for number in 0..3_u8 {
            let file = memory_file(1);
            file.write_all_at(&[number], 0).unwrap();
            let files = if number == 0 {
                vec![]
            } else {
                vec![file.try_clone().unwrap().into()]
            };
            message(number.into(), &vec![number; number.into()], files)
                .send(&ours)
                .unwrap();
        }
        for number in 0..3_u8 {
            let mut message = Message::receive(&theirs).unwrap();
            assert_eq!(message.request(), u32::from(number));
            assert_eq!(message.body(), vec![number; number.into()]);
            assert_eq!(message.descriptors().len(), usize::from(number > 0));
            if let Some(file) = message.descriptors.pop() {
                let mut content = [0];
                File::from(file).read_exact_at(&mut content, 0).unwrap();
                assert_eq!(content, [number]);
            }
        }
    }

    #[test]
    fn too_many_descriptors_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (end, pipe) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let files = (0..MOST_DESCRIPTORS).map(|_| pipe.try_clone().unwrap());
        message(1, b"", files.collect()).send(&ours).unwrap();
        drop(pipe);
        assert_eq!(
            Message::receive(&theirs).unwrap_err().kind(),
            ErrorKind::InvalidData
        );
        // It has an end when nobody has the other one open.
        assert_eq!(read(&end, &mut [0]), Ok(0));
    }

    #[test]
    fn an_endless_message_is_none() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[1_u32, 1, u32::MAX].map(u32::to_ne_bytes).concat())
            .unwrap();
        assert_eq!(
            Message::receive(&theirs).unwrap_err().kind(),
            ErrorKind::InvalidData
        );
    }
}
