// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The listening sockets.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use balloon_control::{Access, SocketFile, listen};

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
