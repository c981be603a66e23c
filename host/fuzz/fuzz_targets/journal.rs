// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front end's messages, and which of them another worker receives.
//!
//! The input is a number of events. A message is 5 bytes and a body: the kind of the event and how many files
//! come with it, the request, its flags, and the body's size.

#![no_main]

use std::fs::{self, File};
use std::io::{ErrorKind, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use vhost_user_balloon::supervisor::journal::Journal;
use vhost_user_balloon::vhost_user::message::{Message, request};

/// More do not fit into a socket.
const MOST_MESSAGES: usize = 64;

/// A file as memory and as an event. It is sealed, so it is the same for each input.
static FILE: LazyLock<OwnedFd> = LazyLock::new(|| {
    let file = memfd_create("memory", MFdFlags::MFD_ALLOW_SEALING).expect("a file");
    let mut file = File::from(file);
    file.write_all(&[0x12; 4096]).expect("its content");
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect("its seal");
    file.into()
});

/// A message as the other side receives it.
#[derive(Clone, Debug, PartialEq)]
struct Sent {
    request: u32,
    need_reply: bool,
    files: usize,
    body: Vec<u8>,
}

impl Sent {
    fn new(message: &Message) -> Self {
        Self {
            request: message.request(),
            need_reply: message.wants_answer(),
            files: message.descriptors().len(),
            body: message.body().to_vec(),
        }
    }

    fn queue(&self) -> Option<u8> {
        let first = self.body.first().copied().unwrap_or_default();
        matches!(
            self.request,
            request::SET_VRING_NUM
                ..=request::SET_VRING_ERR | request::SET_VRING_ENABLE | request::SET_CONFIG
        )
        .then_some(first)
    }

    /// Whether `later` replaces it completely.
    fn is_undone_by(&self, later: &Self) -> bool {
        let same_queue = self.queue() == later.queue();
        match (self.request, later.request) {
            // The offset in the file does not count.
            (request::ADD_MEM_REG, request::REM_MEM_REG) => {
                self.body.get(8..32) == later.body.get(8..32)
            }
            (request::ADD_MEM_REG, _) => false,
            (
                request::SET_VRING_NUM
                | request::SET_VRING_ADDR
                | request::SET_VRING_KICK
                | request::SET_VRING_CALL
                | request::SET_VRING_ERR
                | request::SET_VRING_ENABLE,
                request::GET_VRING_BASE,
            ) => same_queue,
            (this, later) => this == later && same_queue,
        }
    }

    /// Whether a worker may receive this one instead of the other one: an index in a queue may be a
    /// later one.
    fn stands_for(&self, sent: &Self) -> bool {
        let mut sent = sent.clone();
        if sent.request == request::SET_VRING_BASE && sent.body.len() >= 8 && self.body.len() >= 8 {
            sent.body[4..8].copy_from_slice(&self.body[4..8]);
        }
        *self == sent
    }
}

/// The messages that a worker must receive.
fn expected(settled: &[Sent]) -> Vec<&Sent> {
    let lasts = |sent: &Sent| {
        !matches!(
            sent.request,
            request::GET_CONFIG | request::GET_VRING_BASE | request::REM_MEM_REG
        )
    };
    (1..)
        .zip(settled)
        .filter(|(next, sent)| {
            lasts(sent)
                && !settled[*next..]
                    .iter()
                    .any(|later| sent.is_undone_by(later))
        })
        .map(|(_, sent)| sent)
        .collect()
}

/// Takes a message from the input, and makes the journal receive it.
fn receive(files: usize, input: &mut &[u8]) -> Option<Message> {
    let (&[request, flags, low, high], rest) = input.split_first_chunk()?;
    let size = u16::from_le_bytes([low, high]);
    let (body, rest) = rest.split_at(usize::from(size).min(rest.len()));
    *input = rest;
    let header = [u32::from(request), u32::from(flags), size.into()].map(u32::to_ne_bytes);

    let (here, there) = UnixStream::pair().expect("sockets");
    let raw: Vec<RawFd> = vec![FILE.as_raw_fd(); files];
    let rights = [ControlMessage::ScmRights(&raw)];
    let parts = [IoSlice::new(header.as_flattened()), IoSlice::new(body)];
    let rights = if files == 0 { &[] } else { &rights[..] };
    sendmsg::<UnixAddr>(here.as_raw_fd(), &parts, rights, MsgFlags::empty(), None).expect("room");
    here.shutdown(Shutdown::Write).expect("an end");
    Message::receive(&there).ok()
}

/// The messages that a worker receives if it accepts everything.
fn replay(journal: &mut Journal, most: usize) -> Vec<Sent> {
    let (back, mut worker) = UnixStream::pair().expect("sockets");
    let timeout = Some(Duration::from_secs(1));
    back.set_read_timeout(timeout).expect("a timeout");
    // With a body of 64 bits, 0, that accepts a message.
    let answer = [1_u32, 5, 8, 0, 0].map(u32::to_ne_bytes);
    let answers = answer.as_flattened().repeat(most);
    worker.write_all(&answers).expect("room");
    journal.replay(&back).expect("a worker that answers");
    back.shutdown(Shutdown::Write).expect("an end");
    std::iter::from_fn(|| match Message::receive(&worker) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => None,
        other => Some(other.expect("a message")),
    })
    .map(|message| Sent::new(&message))
    .collect()
}

/// How many file descriptors are open.
fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

fn run(mut input: &[u8]) {
    let mut journal = Journal::default();
    let mut settled = Vec::new();
    while settled.len() < MOST_MESSAGES {
        let Some((&event, rest)) = input.split_first() else {
            return;
        };
        input = rest;
        // Now and then there are more than a message may have.
        let files = match event >> 2 {
            files @ 0..8 => files.into(),
            _ => 40,
        };
        if event & 3 < 3 {
            let Some(mut message) = receive(files, &mut input) else {
                return;
            };
            assert_eq!(message.descriptors().len(), files);
            journal.prepare(&mut message);
            settled.push(Sent::new(&message));
            journal.record(message);
        } else {
            let received = replay(&mut journal, settled.len());
            let mut expected = expected(&settled);
            for sent in &received {
                let found = expected.iter().position(|other| sent.stands_for(other));
                expected.remove(found.expect("a message that counts"));
            }
            assert!(expected.is_empty(), "the worker misses {expected:?}");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    LazyLock::force(&FILE);
    let before = open_descriptors();
    run(data);
    assert_eq!(open_descriptors(), before, "descriptors are left open");
});
