// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Unix socket on which each message is a line of JSON.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::balloon::ANSWER;

/// The longest message, in bytes.
const MAX_MESSAGE: u64 = 1 << 20;

/// A connection to such a socket. It is useless after an error.
#[derive(Debug)]
pub(crate) struct Lines(BufReader<UnixStream>);

impl Lines {
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let stream = timeout(ANSWER, UnixStream::connect(path))
            .await?
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The process that listens.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.0.get_ref().peer_cred().ok()?.pid()
    }

    pub(crate) async fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.0.get_mut().write_all(&line).await?)
    }

    pub(crate) async fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = Vec::new();
        let mut limited = (&mut self.0).take(MAX_MESSAGE);
        limited.read_until(b'\n', &mut line).await?;
        if line.last() != Some(&b'\n') {
            bail!("the connection has ended, or a message is longer than {MAX_MESSAGE} bytes");
        }
        Ok(serde_json::from_slice(&line)?)
    }
}
