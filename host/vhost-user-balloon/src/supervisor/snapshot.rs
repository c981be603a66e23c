// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that a supervisor passes to the next one: its sockets, the front end's connection, the journal,
//! and the balloon's state.
//!
//! All of it is in one message that waits in a socket: the file descriptors, the first of which is a file with
//! the rest. A VM may have more memory regions than a message can carry file descriptors: see
//! [`put_descriptors`]. Any process with the socket can read the message, and leaves it there. The supervisor
//! keeps the socket in systemd's file descriptor store, so that it outlives a crash. When the supervisor
//! replaces itself, it passes the socket on as the standard input.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use listenfd::ListenFd;
use log::{error, warn};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg,
    sendmsg, socketpair,
};
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use super::configuration::Configuration;
use super::connection::Connection;
use super::journal::Journal;
use crate::vhost_user::channel::VERSION;
use crate::vhost_user::message::Message;

/// How many file descriptors a message can have: the kernel's `SCM_MAX_FD`.
const MAX_DESCRIPTORS: usize = 253;

const SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// The content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// A later snapshot has a higher number.
    number: u64,
    socket: Option<Vec<u8>>,
    control: Option<Vec<u8>>,
    /// Of the workers for the front end that is connected.
    arguments: Vec<Vec<u8>>,
    has_program: bool,
    connected: bool,
    /// Whether the driver is new, and no worker has started it yet. An older program does not know that.
    #[serde(default)]
    new_driver: bool,
    /// Of the front end that is connected. An older program does not know it.
    #[serde(default)]
    configuration: Configuration,
    #[serde(default)]
    answers: Vec<Entry>,
    messages: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    bytes: Vec<u8>,
    descriptors: usize,
}

impl Entry {
    fn of(message: &Message) -> Self {
        Self {
            bytes: message.bytes().to_vec(),
            descriptors: message.descriptors().len(),
        }
    }

    /// The message, with its file descriptors from `next`.
    fn message(self, next: &mut impl FnMut() -> Result<OwnedFd>) -> Result<Message> {
        let descriptors = (0..self.descriptors)
            .map(|_| next())
            .collect::<Result<_>>()?;
        Ok(Message::from_bytes(self.bytes, descriptors)?)
    }
}

/// A listening socket, and its path.
pub(super) type Listening = (PathBuf, UnixListener);

/// The state of a supervisor.
#[derive(Debug)]
pub(super) struct Snapshot<L = Listening, C = Connection, J = Journal, F = OwnedFd> {
    pub(super) socket: Option<L>,
    pub(super) control: Option<L>,
    /// The fallback if the next supervisor's program does not work.
    pub(super) program: Option<F>,
    /// The file with the balloon's state.
    pub(super) kept: F,
    pub(super) arguments: Vec<OsString>,
    pub(super) frontend: Option<(C, J)>,
}

impl Snapshot {
    /// The state of a daemon that starts.
    pub(super) fn empty() -> Result<Self> {
        Ok(Self {
            socket: None,
            control: None,
            program: None,
            kept: memory_file()?.into(),
            arguments: Vec::new(),
            frontend: None,
        })
    }
}

/// The current state of the supervisor.
pub(super) type Current<'a> =
    Snapshot<(&'a PathBuf, &'a UnixListener), &'a Connection, &'a Journal, BorrowedFd<'a>>;

/// A snapshot in a socket.
#[derive(Debug)]
pub(super) struct Stored {
    socket: OwnedFd,
    file: File,
}

impl Current<'_> {
    fn content(&self, number: u64) -> Result<Vec<u8>> {
        let path = |(path, _): &(&PathBuf, _)| path.as_os_str().as_bytes().to_vec();
        let none = Journal::default();
        let journal = self.frontend.as_ref().map(|&(_, journal)| journal);
        let journal = journal.unwrap_or(&none);
        Ok(serde_json::to_vec(&Content {
            version: VERSION,
            number,
            socket: self.socket.as_ref().map(path),
            control: self.control.as_ref().map(path),
            arguments: self
                .arguments
                .iter()
                .map(|argument| argument.as_bytes().to_vec())
                .collect(),
            has_program: self.program.is_some(),
            connected: self.frontend.is_some(),
            new_driver: journal.is_new(),
            configuration: journal.configuration().clone(),
            answers: journal.answers().iter().map(Entry::of).collect(),
            messages: journal.messages().iter().map(Entry::of).collect(),
        })?)
    }

    /// Puts it into a socket.
    pub(super) fn store(&self, number: u64) -> Result<Stored> {
        let file = memory_file()?;
        let mut descriptors = vec![file.as_fd(), self.kept];
        let sockets = self.socket.iter().chain(&self.control);
        descriptors.extend(sockets.map(|(_, listener)| listener.as_fd()));
        descriptors.extend(self.program);
        if let Some((connection, journal)) = &self.frontend {
            descriptors.push(connection.socket().as_fd());
            let messages = journal.messages().iter();
            descriptors.extend(messages.flat_map(Message::descriptors).map(AsFd::as_fd));
            // An older program, which does not know the pipe, ignores the last ones.
            descriptors.extend(connection.pipe());
        }
        let socket = put_descriptors(&descriptors)?;
        let stored = Stored { socket, file };
        stored.update(&self.content(number)?)?;
        Ok(stored)
    }
}

impl Stored {
    /// The socket, to be passed on.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Replaces the file's content. A reader sees the old or the new content, whenever this process
    /// ends.
    fn update(&self, content: &[u8]) -> Result<()> {
        /// The place and the length of the content are at the start.
        const HEADER: u64 = 16;
        const PAGE: u64 = 4096;
        let mut header = [0; 16];
        // The file is empty at first.
        let _ = self.file.read_at(&mut header, 0)?;
        let (place, length) = parse(header);
        // The new one before the old one if it fits, otherwise after it.
        let size = content.len() as u64;
        let start = if place >= PAGE + size {
            PAGE
        } else {
            (place + length).max(HEADER).next_multiple_of(PAGE)
        };
        self.file.write_all_at(content, start)?;
        let header = [start, size].map(u64::to_ne_bytes).concat();
        self.file.write_all_at(&header, 0)?;
        Ok(())
    }
}

fn parse(header: [u8; 16]) -> (u64, u64) {
    let (place, length) = header.split_at(8);
    let number = |bytes: &[u8]| {
        bytes
            .first_chunk()
            .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    };
    (number(place), number(length))
}

/// An empty file in memory.
fn memory_file() -> Result<File> {
    Ok(memfd_create("balloon", MFdFlags::MFD_CLOEXEC)?.into())
}

/// Puts file descriptors into a socket, as one message. Those that do not fit wait in further sockets. These sockets
/// are the last descriptors of the message, and its only byte is their number. The kernel counts them for the user, and
/// compares the number with the limit of this process for open files.
fn put_descriptors(descriptors: &[BorrowedFd<'_>]) -> Result<OwnedFd> {
    let too_many = descriptors.len().saturating_sub(MAX_DESCRIPTORS);
    // Each of the sockets needs a descriptor in the message.
    let sockets = too_many.div_ceil(MAX_DESCRIPTORS - 1);
    let first = MAX_DESCRIPTORS.saturating_sub(sockets);
    let (first, others) = descriptors.split_at(first.min(descriptors.len()));
    let others: Vec<OwnedFd> = others
        .chunks(MAX_DESCRIPTORS)
        .map(put_descriptors)
        .collect::<Result<_>>()?;
    let number = [u8::try_from(others.len())?];
    let message: Vec<_> = first
        .iter()
        .copied()
        .chain(others.iter().map(AsFd::as_fd))
        .collect();

    let (socket, other_end) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let pushed = control.push(SendAncillaryMessage::ScmRights(&message));
    ensure!(pushed, "the file descriptors do not fit into a message");
    retry_on_intr(|| {
        let parts = [IoSlice::new(&number)];
        sendmsg(&other_end, &parts, &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(socket)
}

/// Reads the file descriptors that wait in a socket, and leaves them there.
fn peek_descriptors(socket: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut number = [0];
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut number)];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(socket, &mut parts, &mut control, flags)
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    ensure!(
        !received.flags.contains(ReturnFlags::CTRUNC),
        "this process may not have enough file descriptors; raise LimitNOFILE= of its service"
    );
    let first = descriptors.len().saturating_sub(number[0].into());
    for socket in descriptors.split_off(first) {
        descriptors.extend(peek_descriptors(socket.as_fd())?);
    }
    Ok(descriptors)
}

/// Reads the snapshot in a socket, and its number.
fn load(socket: BorrowedFd<'_>) -> Result<(u64, Snapshot)> {
    let mut descriptors = peek_descriptors(socket)?.into_iter();
    let mut next = || descriptors.next().context("a file descriptor is missing");
    let file = File::from(next()?);
    let mut header = [0; 16];
    file.read_exact_at(&mut header, 0)?;
    let (place, length) = parse(header);
    let mut content = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut content, place)?;
    let content: Content = serde_json::from_slice(&content)?;
    ensure!(
        content.version <= VERSION,
        "its version is {}, and this program knows {VERSION}",
        content.version
    );
    let kept = next()?;
    let mut listening = |path: Option<Vec<u8>>| -> Result<Option<Listening>> {
        path.map(|path| Ok((OsString::from_vec(path).into(), next()?.into())))
            .transpose()
    };
    let socket = listening(content.socket)?;
    let control = listening(content.control)?;
    let program = content.has_program.then(&mut next).transpose()?;
    let frontend = if content.connected {
        let socket = UnixStream::from(next()?);
        let mut messages = |entries: Vec<Entry>| -> Result<Vec<_>> {
            let entries = entries.into_iter();
            entries.map(|entry| entry.message(&mut next)).collect()
        };
        let journal = Journal::new(
            messages(content.messages)?,
            content.new_driver,
            content.configuration,
            messages(content.answers)?,
        );
        let connection = match (next(), next()) {
            (Ok(reader), Ok(writer)) => Connection::of_another(socket, reader, writer),
            _ => Connection::new(socket)?,
        };
        Some((connection, journal))
    } else {
        None
    };
    let snapshot = Snapshot {
        socket,
        control,
        program,
        kept,
        arguments: content
            .arguments
            .into_iter()
            .map(OsString::from_vec)
            .collect(),
        frontend,
    };
    Ok((content.number, snapshot))
}

/// Where snapshots are kept while the supervisor runs.
#[derive(Debug, Default)]
pub(super) struct Store {
    /// Whether systemd keeps file descriptors for this service.
    systemd: bool,
    number: u64,
    stored: Option<Stored>,
    /// The generation of the file descriptors in it.
    key: Option<(bool, u64)>,
    /// Whether its failure was logged.
    failed: bool,
}

/// The name of a snapshot in systemd's store.
fn name(number: u64) -> String {
    format!("snapshot-{number}")
}

impl Store {
    /// Finds the snapshot of the previous supervisor, in this socket or in systemd's store.
    pub(super) fn open(socket: Option<BorrowedFd<'_>>) -> (Self, Option<Snapshot>) {
        let mut sockets = ListenFd::from_env();
        let kept: Vec<OwnedFd> = (0..sockets.len())
            .filter_map(|place| {
                let hint = "a snapshot";
                sockets
                    .take_custom(place, libc::AF_UNIX, libc::SOCK_SEQPACKET, hint)
                    .inspect_err(|error| warn!("ignoring a file descriptor: {error}"))
                    .ok()
                    .flatten()
            })
            .collect();
        let mut found: Vec<_> = kept
            .iter()
            .map(AsFd::as_fd)
            .chain(socket)
            .filter_map(|socket| {
                load(socket)
                    .inspect_err(|error| error!("a snapshot cannot be read: {error:#}"))
                    .ok()
            })
            .collect();
        if let Some(socket) = socket {
            // Its file descriptors would stay open in the socket.
            let _ = recv(socket, &mut [0; 1][..], RecvFlags::DONTWAIT);
        }
        // Of two with the same number the one in the socket is newer.
        found.sort_by_key(|(number, _)| *number);
        let mut store = Self {
            systemd: std::env::var_os("FDSTORE").is_some(),
            ..Self::default()
        };
        let last = found.pop();
        let Some((number, snapshot)) = last else {
            return (store, None);
        };
        for (other, _) in found {
            if other != number {
                store.forget(other);
            }
        }
        store.number = number;
        (store, Some(snapshot))
    }

    /// Whether this supervisor's state outlives it.
    pub(super) fn is_persistent(&self) -> bool {
        self.systemd
    }

    /// The number of the last snapshot.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Stores a snapshot, which replaces the previous one.
    pub(super) fn save(&mut self, current: &Current<'_>) {
        if !self.systemd {
            return;
        }
        match self.try_save(current) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                error!("a restart of the supervisor would lose the VMM: {error:#}");
            }
            Err(_) => {}
        }
    }

    fn try_save(&mut self, current: &Current<'_>) -> Result<()> {
        let key = match &current.frontend {
            Some((_, journal)) => (true, journal.descriptors()),
            None => (false, 0),
        };
        if let (Some(stored), true) = (&self.stored, self.key == Some(key)) {
            return stored.update(&current.content(self.number)?);
        }
        let (old, new) = (self.number, self.number + 1);
        let stored = current.store(new)?;
        let name = name(new);
        let state = [
            NotifyState::FdStore,
            NotifyState::FdName(&name),
            // The other end is closed, and the socket keeps its content.
            NotifyState::Custom("FDPOLL=0"),
        ];
        sd_notify::notify_with_fds(&state, &[stored.socket.as_fd()])?;
        self.forget(old);
        self.number = new;
        self.key = Some(key);
        self.stored = Some(stored);
        Ok(())
    }

    fn forget(&self, number: u64) {
        if self.systemd {
            let name = name(number);
            let state = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
            if let Err(error) = sd_notify::notify(&state) {
                warn!("cannot remove a snapshot from systemd's store: {error}");
            }
        }
    }
}

/// Notifies systemd, if this is one of its services.
pub(super) fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        if error.kind() != io::ErrorKind::NotFound {
            warn!("cannot notify systemd: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use crate::vhost_user::message::request;
    use crate::vhost_user::message::tests::message;

    #[test]
    fn the_service_may_keep_the_descriptors_of_many_vms() {
        const VMS: usize = 1000;
        let unit = include_str!("../../systemd/vhost-user-balloon@.service");
        let limit = unit
            .lines()
            .find_map(|line| line.strip_prefix("LimitNOFILE="));
        let limit: usize = limit.unwrap().parse().unwrap();
        assert!(limit >= VMS * MAX_DESCRIPTORS);
    }

    #[test]
    fn any_number_of_memory_regions_is_kept() {
        // A message has room for 248 next to the two files, the connection and its pipe.
        for regions in [0, 247, 248, 249, 300] {
            let (frontend, _vmm) = UnixStream::pair().unwrap();
            let connection = Connection::new(frontend).unwrap();
            let messages = (1..=regions).map(|size| {
                let file = testing::memory_file(size).try_clone().unwrap();
                message(request::ADD_MEM_REG, b"", vec![file.into()])
            });
            let journal = Journal::new(
                messages.collect(),
                true,
                Configuration::default(),
                Vec::new(),
            );
            let kept = testing::memory_file(7);
            let current = Current {
                socket: None,
                control: None,
                program: None,
                kept: kept.as_fd(),
                arguments: Vec::new(),
                frontend: Some((&connection, &journal)),
            };
            let stored = current.store(3).unwrap();
            // Reading does not remove it.
            for _ in 0..2 {
                let (number, snapshot) = load(stored.socket.as_fd()).unwrap();
                assert_eq!(number, 3);
                let size = |fd: &OwnedFd| {
                    File::from(fd.try_clone().unwrap())
                        .metadata()
                        .unwrap()
                        .len()
                };
                assert_eq!(size(&snapshot.kept), 7);
                let (_, journal) = snapshot.frontend.unwrap();
                assert!(journal.is_new());
                let sizes = journal
                    .messages()
                    .iter()
                    .flat_map(Message::descriptors)
                    .map(size);
                assert!(sizes.eq(1..=regions), "{regions}");
            }
        }
    }
}
