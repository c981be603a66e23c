// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The listening sockets.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use balloon_control::{Access, SocketFile, listen};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::AcceptConn;
use nix::unistd::close;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::snapshot::Listening;

/// A listening socket, and its file if this process has created it.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) path: PathBuf,
    pub(super) listener: UnixListener,
    file: Option<SocketFile>,
}

impl Socket {
    /// Continues with a socket of the previous supervisor, or listens on a new one.
    pub(super) fn new(path: &Path, access: Access, kept: Option<Listening>) -> Result<Self> {
        if let Some((_, listener)) = kept.filter(|(kept, _)| kept == path && path.exists()) {
            access
                .apply(path)
                .with_context(|| format!("changing the access to {}", path.display()))?;
            return Ok(Self {
                path: path.to_owned(),
                listener,
                file: SocketFile::new(path).ok(),
            });
        }
        let (listener, file) = listen(path, access)?;
        // A client may disconnect before it is accepted.
        listener.set_nonblocking(true)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            file: Some(file),
        })
    }

    /// Listens on a socket that this process has got.
    pub(super) fn received((path, listener): Listening) -> Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            path,
            listener,
            file: None,
        })
    }

    pub(super) fn current(&self) -> (&PathBuf, &UnixListener) {
        (&self.path, &self.listener)
    }

    /// The socket's path with something appended.
    pub(super) fn with_suffix(&self, suffix: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    pub(super) fn remove(&self) {
        if let Some(file) = &self.file {
            file.remove();
        }
    }
}

/// The listening socket that is the file descriptor of this number, and its path. The daemon's other processes do not
/// get the descriptor. Call this before the process opens files: the number may be that of one of them, if the process
/// was started without the socket.
pub(super) fn take(number: i32) -> Result<Listening> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    let descriptor = pidfd_getfd(process, number, PidfdGetfdFlags::empty())
        .with_context(|| format!("there is no file descriptor {number}, which --fd names"))?;
    ensure!(
        getsockopt(&descriptor, AcceptConn).unwrap_or_default(),
        "the file descriptor {number}, which --fd names, is no socket that listens"
    );
    close(number)?;
    let listener = UnixListener::from(descriptor);
    let address = listener.local_addr()?;
    // The daemon creates files next to it.
    let path = address.as_pathname().filter(|path| path.is_absolute());
    let path = path.with_context(|| {
        format!(
            "the socket of the file descriptor {number}, which --fd names, has no absolute path"
        )
    })?;
    Ok((path.to_owned(), listener))
}
