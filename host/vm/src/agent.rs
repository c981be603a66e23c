// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's side of the protocol with the agent in the guest.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use agent::{Command, Reply, Request, Response};
use anyhow::{Context, Result, anyhow, bail};

/// Ids are unique among all guests: a guest that another QEMU has resumed still answers earlier
/// requests.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A connection to the agent.
#[derive(Debug)]
pub(crate) struct Agent {
    stream: Mutex<UnixStream>,
    requests: Arc<Requests>,
}

/// The open requests. While a guest migrates, there are two streams for its answers.
#[derive(Debug, Default)]
struct Requests {
    waiting: Mutex<HashMap<u64, Sender<Result<Reply, String>>>>,
    streams: AtomicUsize,
}

/// A request that has not been answered yet.
#[derive(Debug)]
pub struct Pending {
    answer: Receiver<Result<Reply, String>>,
}

impl Agent {
    /// Adopts the stream to the agent's port. The agent may start later.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        Self::connect(stream, Arc::default())
    }

    /// The same agent, through the QEMU that its guest migrates to.
    pub(crate) fn by_way_of(&self, stream: UnixStream) -> Result<Self> {
        Self::connect(stream, Arc::clone(&self.requests))
    }

    fn connect(stream: UnixStream, requests: Arc<Requests>) -> Result<Self> {
        let reader = BufReader::new(stream.try_clone()?);
        requests.streams.fetch_add(1, Ordering::Relaxed);
        let answered = Arc::clone(&requests);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                let Ok(Response { id, result }) = serde_json::from_str(&line) else {
                    break;
                };
                if let Some(sender) = answered.waiting.lock().expect("a lock").remove(&id) {
                    // This fails only if the waiting caller has returned.
                    let _ = sender.send(result);
                }
            }
            // QEMU has ended: dropping the senders notifies the callers that still wait.
            if answered.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
                answered.waiting.lock().expect("a lock").clear();
            }
        });
        Ok(Self {
            stream: Mutex::new(stream),
            requests,
        })
    }

    /// Sends a request.
    pub(crate) fn send(&self, command: Command) -> Result<Pending> {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = mpsc::channel();
        self.requests
            .waiting
            .lock()
            .expect("a lock")
            .insert(id, sender);
        let mut line = serde_json::to_vec(&Request { id, command })?;
        line.push(b'\n');
        self.stream
            .lock()
            .expect("a lock")
            .write_all(&line)
            .context("QEMU is gone")?;
        Ok(Pending { answer })
    }
}

impl Pending {
    /// The answer, if it arrives within `timeout`.
    ///
    /// # Errors
    ///
    /// The agent could not execute the request, or the guest has ended.
    pub(crate) fn poll(&self, timeout: Duration) -> Result<Option<Reply>> {
        match self.answer.recv_timeout(timeout) {
            Ok(Ok(reply)) => Ok(Some(reply)),
            Ok(Err(reason)) => Err(anyhow!(reason)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
        }
    }
}
