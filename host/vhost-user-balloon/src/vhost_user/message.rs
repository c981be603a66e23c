// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of the vhost-user protocol, as far as the supervisor needs to know them: a header, the body,
//! and the file descriptors.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::VhostUserHeaderFlag;

/// The size of a message's header in bytes: request, flags, and the size of the rest.
const HEADER: usize = 12;

/// How long the rest of a message may be, in bytes.
const MAX_BODY: usize = 4096;

/// How many file descriptors may come with a message.
const MAX_DESCRIPTORS: usize = 32;

/// How many file descriptors a process can send at once: the kernel's `SCM_MAX_FD`. A receiver with less space would
/// leave some of them open.
const KERNEL_MAX_DESCRIPTORS: usize = 253;

/// The space that these take with a message, in bytes.
const SPACE: usize = rustix::cmsg_space!(ScmRights(KERNEL_MAX_DESCRIPTORS));

/// The front end's requests that the supervisor knows.
pub mod request {
    use vhost::vhost_user::message::FrontendReq;

    /// The features that the device offers.
    pub const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
    /// The features that the driver has accepted.
    pub const SET_FEATURES: u32 = FrontendReq::SET_FEATURES as u32;
    /// The start of a connection.
    pub const SET_OWNER: u32 = FrontendReq::SET_OWNER as u32;
    /// The memory as a whole.
    pub const SET_MEM_TABLE: u32 = FrontendReq::SET_MEM_TABLE as u32;
    /// How many descriptors a queue has.
    pub const SET_VRING_NUM: u32 = FrontendReq::SET_VRING_NUM as u32;
    /// The addresses of a queue's rings, in the front end's address space.
    pub const SET_VRING_ADDR: u32 = FrontendReq::SET_VRING_ADDR as u32;
    /// The index from which on a queue's available ring is to be read.
    pub const SET_VRING_BASE: u32 = FrontendReq::SET_VRING_BASE as u32;
    /// The end of a queue, answered with that index.
    pub const GET_VRING_BASE: u32 = FrontendReq::GET_VRING_BASE as u32;
    /// The event by which the guest notifies the device of messages in a queue.
    pub const SET_VRING_KICK: u32 = FrontendReq::SET_VRING_KICK as u32;
    /// The event that interrupts the guest.
    pub const SET_VRING_CALL: u32 = FrontendReq::SET_VRING_CALL as u32;
    /// The event for errors of a queue.
    pub const SET_VRING_ERR: u32 = FrontendReq::SET_VRING_ERR as u32;
    /// The optional features of the protocol.
    pub const GET_PROTOCOL_FEATURES: u32 = FrontendReq::GET_PROTOCOL_FEATURES as u32;
    /// The features of the protocol that the front end uses.
    pub const SET_PROTOCOL_FEATURES: u32 = FrontendReq::SET_PROTOCOL_FEATURES as u32;
    /// How many queues the device can have.
    pub const GET_QUEUE_NUM: u32 = FrontendReq::GET_QUEUE_NUM as u32;
    /// Whether a queue is in use.
    pub const SET_VRING_ENABLE: u32 = FrontendReq::SET_VRING_ENABLE as u32;
    /// The socket for the device's own messages.
    pub const SET_BACKEND_REQ_FD: u32 = FrontendReq::SET_BACKEND_REQ_FD as u32;
    /// A part of the configuration space.
    pub const GET_CONFIG: u32 = FrontendReq::GET_CONFIG as u32;
    /// A write of the guest to it.
    pub const SET_CONFIG: u32 = FrontendReq::SET_CONFIG as u32;
    /// How many regions of memory there can be.
    pub const GET_MAX_MEM_SLOTS: u32 = FrontendReq::GET_MAX_MEM_SLOTS as u32;
    /// A part of the memory.
    pub const ADD_MEM_REG: u32 = FrontendReq::ADD_MEM_REG as u32;
    /// The removal of a part of the memory.
    pub const REM_MEM_REG: u32 = FrontendReq::REM_MEM_REG as u32;
}

/// A message.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Whether this process could not receive all of its file descriptors.
    is_truncated: bool,
}

/// A message of the front end, which may still be in the socket.
#[derive(Debug)]
pub struct Head {
    /// The message.
    pub message: Message,
    /// Its place in the socket.
    pub queued: Queued,
}

/// So many bytes at the start of a socket's data.
#[derive(Debug)]
pub struct Queued(usize);

impl Queued {
    /// Removes them from the socket.
    ///
    /// # Errors
    ///
    /// The other side has closed the connection.
    pub fn take(self, mut from: &UnixStream) -> io::Result<()> {
        // The file descriptors are not received again.
        from.read_exact(&mut vec![0; self.0])
    }
}

impl Head {
    /// Reads the next message, and leaves it in the socket: if this process is killed, another one reads it
    /// again. A message that was sent in several parts is removed from the socket.
    ///
    /// # Errors
    ///
    /// The other side has closed the connection, or does not use the protocol.
    pub fn peek(from: &UnixStream) -> io::Result<Self> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        // Room for the longest message, and perhaps for a part of the next one.
        let mut bytes = vec![0; HEADER + MAX_BODY];
        let Part {
            received,
            descriptors,
            is_truncated,
        } = receive_part(from, &mut bytes, flags)?;
        if received >= HEADER {
            let size = HEADER + Message::size(&bytes)?;
            if received >= size {
                bytes.truncate(size);
                let mut message = Message {
                    bytes,
                    descriptors,
                    is_truncated,
                };
                // If a message has none, Linux adds those of the next message.
                if !message.has_descriptors() {
                    message.descriptors.clear();
                    message.is_truncated = false;
                }
                return Ok(Self {
                    message,
                    queued: Queued(size),
                });
            }
        }
        Ok(Self {
            message: Message::receive(from)?,
            queued: Queued(0),
        })
    }
}

impl Message {
    /// A message of this process's own.
    pub fn new(request: u32, body: &[u8], descriptors: Vec<OwnedFd>) -> Self {
        const VERSION: u32 = 1;
        // No message of this process's own is nearly that long.
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let header = [request, VERSION, size].map(u32::to_ne_bytes);
        Self {
            bytes: [header.as_flattened(), body].concat(),
            descriptors,
            is_truncated: false,
        }
    }

    /// The answer to a message, with this body.
    pub fn answer(&self, body: &[u8]) -> Self {
        let mut answer = Self::new(self.request(), body, Vec::new());
        answer.set_flag(VhostUserHeaderFlag::REPLY, true);
        answer
    }

    /// The message with these bytes, and these file descriptors.
    ///
    /// # Errors
    ///
    /// The bytes are not one whole message.
    pub fn from_bytes(bytes: Vec<u8>, descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        if bytes.len() < HEADER || bytes.len() != HEADER + Self::size(&bytes)? {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(Self {
            bytes,
            descriptors,
            is_truncated: false,
        })
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How long the body of the message with this header is.
    fn size(header: &[u8]) -> io::Result<usize> {
        let size = header.get(8..).and_then(<[u8]>::first_chunk);
        let size = size.map_or(u32::MAX, |size| u32::from_ne_bytes(*size));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_BODY {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(size)
    }

    /// Receives a message, and never a part of the next one.
    ///
    /// # Errors
    ///
    /// The other side is gone, or does not speak the protocol.
    pub fn receive(mut from: &UnixStream) -> io::Result<Self> {
        let mut bytes = vec![0; HEADER];
        let Part {
            received,
            descriptors,
            is_truncated,
        } = receive_part(from, &mut bytes, RecvFlags::CMSG_CLOEXEC)?;
        from.read_exact(bytes.get_mut(received..).unwrap_or_default())?;
        let size = Self::size(&bytes)?;
        let mut message = Self {
            bytes,
            descriptors,
            is_truncated,
        };
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

    /// The request.
    pub fn request(&self) -> u32 {
        self.word(0).unwrap_or_default()
    }

    /// Whether it requires an answer: some requests always do, others if this bit is set.
    pub fn wants_answer(&self) -> bool {
        self.flags().contains(VhostUserHeaderFlag::NEED_REPLY)
    }

    /// Sets or clears the flag for an answer.
    pub fn set_wants_answer(&mut self, wanted: bool) {
        self.set_flag(VhostUserHeaderFlag::NEED_REPLY, wanted);
    }

    /// Bits that the library does not know stay.
    fn flags(&self) -> VhostUserHeaderFlag {
        VhostUserHeaderFlag::from_bits_retain(self.word(4).unwrap_or_default())
    }

    fn set_flag(&mut self, flag: VhostUserHeaderFlag, set: bool) {
        let mut flags = self.flags();
        flags.set(flag, set);
        if let Some(bytes) = self.bytes.get_mut(4..8) {
            bytes.copy_from_slice(&flags.bits().to_ne_bytes());
        }
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// The same, mutable.
    pub fn body_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(HEADER..).unwrap_or_default()
    }

    /// Whether file descriptors belong to the message, by the protocol.
    fn has_descriptors(&self) -> bool {
        /// The bit in the body of a message with an event that says that there is none.
        const NO_EVENT: u8 = 1;
        match self.request() {
            request::SET_MEM_TABLE | request::ADD_MEM_REG | request::SET_BACKEND_REQ_FD => true,
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => self
                .body()
                .get(1)
                .is_some_and(|flags| flags & NO_EVENT == 0),
            _ => false,
        }
    }

    /// Its body, and the file descriptors that came with it.
    pub fn into_parts(self) -> (Vec<u8>, Vec<OwnedFd>) {
        let Self {
            mut bytes,
            descriptors,
            ..
        } = self;
        bytes.drain(..HEADER.min(bytes.len()));
        (bytes, descriptors)
    }

    /// The file descriptors that came with it.
    pub fn descriptors(&self) -> &[OwnedFd] {
        &self.descriptors
    }

    /// Whether this process could not receive all of its file descriptors, because of its limit.
    pub fn is_truncated(&self) -> bool {
        self.is_truncated
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    }
}

/// Some of the bytes of a message.
struct Part {
    /// How many bytes.
    received: usize,
    /// The file descriptors that came with them.
    descriptors: Vec<OwnedFd>,
    is_truncated: bool,
}

/// Receives up to so many bytes, and the file descriptors that came with them.
fn receive_part(from: &UnixStream, bytes: &mut [u8], flags: RecvFlags) -> io::Result<Part> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(bytes)];
        recvmsg(from, &mut parts, &mut control, flags)
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(ErrorKind::InvalidData.into());
    }
    Ok(Part {
        received: received.bytes,
        descriptors,
        is_truncated: received.flags.contains(ReturnFlags::CTRUNC),
    })
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
        Message::new(request, body, descriptors)
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
    fn a_message_stays_until_it_is_taken() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = || memory_file(1).try_clone().unwrap().into();
        message(5, b"one", vec![file(), file()])
            .send(&ours)
            .unwrap();
        message(2, b"", vec![]).send(&ours).unwrap();
        message(13, &[0, 1, 0, 0], vec![]).send(&ours).unwrap();
        message(37, b"last", vec![file()]).send(&ours).unwrap();
        for (request, body, files) in [
            (5, "one", 2),
            (2, "", 0),
            (13, "\0\x01\0\0", 0),
            (37, "last", 1),
        ] {
            for _ in 0..2 {
                let head = Head::peek(&theirs).unwrap();
                assert_eq!(head.message.request(), request);
                assert_eq!(head.message.body(), body.as_bytes());
                assert_eq!(head.message.descriptors().len(), files);
            }
            Head::peek(&theirs).unwrap().queued.take(&theirs).unwrap();
        }
        assert_eq!(
            Head::peek(&theirs).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        drop(ours);
        assert_eq!(
            Head::peek(&theirs).unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_message_in_parts_is_taken_at_once() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let whole = message(1, b"body", vec![]);
        ours.write_all(&whole.bytes()[..14]).unwrap();
        let sender = std::thread::spawn(move || {
            ours.write_all(&whole.bytes()[14..]).unwrap();
            message(2, b"", vec![]).send(&ours).unwrap();
            ours
        });
        let head = Head::peek(&theirs).unwrap();
        let _ours = sender.join().unwrap();
        assert_eq!(head.message.body(), b"body");
        head.queued.take(&theirs).unwrap();
        assert_eq!(Head::peek(&theirs).unwrap().message.request(), 2);
    }

    #[test]
    fn too_many_descriptors_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (end, pipe) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let files = (0..KERNEL_MAX_DESCRIPTORS).map(|_| pipe.try_clone().unwrap());
        message(1, b"", files.collect()).send(&ours).unwrap();
        drop(pipe);
        assert_eq!(
            Message::receive(&theirs).unwrap_err().kind(),
            ErrorKind::InvalidData
        );
        // It reports an end of file only if all copies of the other end are closed.
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
