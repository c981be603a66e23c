// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A substitute for systemd, for a service that is restarted. It receives the service's notifications, stores the
//! file descriptors that it sends, and passes them to its next process.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// The number of the first file descriptor that a service gets.
const FIRST_DESCRIPTOR: i32 = 3;

/// How many file descriptors a service may store.
const MAX_DESCRIPTORS: usize = 8;

/// The manager of one service.
#[derive(Debug)]
pub struct ServiceManager {
    path: PathBuf,
    service: Arc<Service>,
}

#[derive(Debug)]
struct Service {
    socket: UnixDatagram,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    stored: Vec<(String, OwnedFd)>,
    is_ready: bool,
}

impl ServiceManager {
    /// A manager whose socket is in this directory.
    ///
    /// # Errors
    ///
    /// There is a socket already, or the system has no thread.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let path = directory.join("notify");
        let service = Arc::new(Service {
            socket: UnixDatagram::bind(&path)?,
            state: Mutex::default(),
        });
        // A service waits if its manager does not read.
        let reader = Arc::clone(&service);
        thread::Builder::new()
            .name("service-manager".to_owned())
            .spawn(move || while reader.receive(RecvFlags::empty()).is_ok() {})?;
        Ok(Self { path, service })
    }

    /// Prepares a command that starts the service, with the file descriptors that its previous
    /// process stored.
    ///
    /// # Errors
    ///
    /// The system has no file descriptors.
    pub fn prepare(&self, command: &mut Command) -> io::Result<()> {
        let mut state = self.state();
        state.is_ready = false;
        let stored: io::Result<Vec<_>> = (FIRST_DESCRIPTOR..)
            .zip(&state.stored)
            .map(|(child_fd, (_, fd))| {
                Ok(FdMapping {
                    parent_fd: fd.try_clone()?,
                    child_fd,
                })
            })
            .collect();
        command.env("LISTEN_FDS", state.stored.len().to_string());
        command.env("FDSTORE", MAX_DESCRIPTORS.to_string());
        command.env("NOTIFY_SOCKET", &self.path);
        command.fd_mappings(stored?).map_err(io::Error::other)?;
        Ok(())
    }

    /// Whether the service has become ready since it was prepared.
    pub fn is_ready(&self) -> bool {
        self.state().is_ready
    }

    /// The number of stored file descriptors.
    pub fn stored(&self) -> usize {
        self.state().stored.len()
    }

    /// The state, after all notifications of the service so far.
    fn state(&self) -> MutexGuard<'_, State> {
        while self.service.receive(RecvFlags::DONTWAIT).is_ok() {}
        self.service.state()
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        // This ends the thread. Shutting down a socket always succeeds.
        let _ = self.service.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives a notification.
    fn receive(&self, flags: RecvFlags) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let length = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            recvmsg(&self.socket, &mut parts, &mut control, flags)?.bytes
        };
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        let has = |line: &str| text.lines().any(|other| other == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.unwrap_or("stored");
        let mut state = self.state();
        state.is_ready |= has("READY=1");
        if has("FDSTOREREMOVE=1") {
            state.stored.retain(|(stored, _)| stored != name);
        }
        if has("FDSTORE=1") {
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    let stored = rights.map(|fd| (name.to_owned(), fd));
                    state.stored.extend(stored);
                }
            }
        }
        Ok(())
    }
}
