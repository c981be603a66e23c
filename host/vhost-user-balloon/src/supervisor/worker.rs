// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The worker process, as the supervisor sees it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{self, Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balloon_control::{Access, listen};
use log::warn;

use super::program::command;
use crate::vhost_user::channel::{CONFIG_CHANGED, READY, SERVE, START, TRIAL, VERSION};
use crate::vhost_user::message::Message;

/// How long a worker may take until it is ready.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a worker may take for an answer, and to end.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to check whether it has ended.
const INTERVAL: Duration = Duration::from_millis(2);

/// A process that implements the device, or will.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
    channel: UnixStream,
    started: Instant,
    ready: bool,
    ended: bool,
    /// When it is killed, unless it responds.
    deadline: Option<Instant>,
}

/// A message of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    /// The configuration space has changed.
    pub(super) config_changed: bool,
    /// It is ready.
    pub(super) ready: bool,
    /// It has closed its channel: it has ended, or is ending.
    pub(super) ended: bool,
}

impl Worker {
    /// Starts a program as a worker. It reads the balloon's state from the file `kept`, and answers the clients
    /// of the control socket.
    pub(super) fn start(
        program: &Path,
        arguments: &[OsString],
        kept: &File,
        control: Option<&UnixListener>,
    ) -> Result<Self> {
        let mut files = vec![kept.try_clone()?.into()];
        if let Some(control) = control {
            files.push(control.try_clone()?.into());
        }
        Self::spawn(program, arguments, &Message::new(START, &[], files))
    }

    /// Starts a program as a worker without a device, to see whether that works.
    pub(super) fn start_trial(program: &Path, arguments: &[OsString]) -> Result<Self> {
        let start = Message::new(START, TRIAL, Vec::new());
        Self::spawn(program, arguments, &start)
    }

    fn spawn(program: &Path, arguments: &[OsString], start: &Message) -> Result<Self> {
        let (channel, theirs) = UnixStream::pair()?;
        channel.set_nonblocking(true)?;
        let child = command(program)
            .args(arguments)
            .arg(format!("--worker={VERSION}"))
            .arg(format!("--parent={}", process::id()))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let now = Instant::now();
        let worker = Self {
            child,
            channel,
            started: now,
            ready: false,
            ended: false,
            deadline: Some(now + START_TIMEOUT),
        };
        start.send(&worker.channel)?;
        Ok(worker)
    }

    /// Readable when the worker has sent something.
    pub(super) fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it waits for a front end, or serves one.
    pub(super) fn is_ready(&self) -> bool {
        self.ready && !self.ended
    }

    /// Whether it has closed its channel.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// When it was started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Reads its messages.
    pub(super) fn read(&mut self) -> Events {
        let mut events = Events::default();
        let mut bytes = [0; 64];
        loop {
            match (&self.channel).read(&mut bytes) {
                Ok(0) => events.ended = true,
                Ok(length) => {
                    let bytes = bytes.get(..length).unwrap_or_default();
                    events.ready |= bytes.contains(&READY);
                    events.config_changed |= bytes.contains(&CONFIG_CHANGED);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => events.ended = true,
            }
            break;
        }
        if events.ready {
            self.ready = true;
            self.deadline = None;
        }
        if events.ended && !self.ended {
            self.ended = true;
            self.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        }
        events
    }

    /// Connects to it, for the front end in the process `vmm`. Its driver `continues`, or has not started yet. The
    /// worker gets a socket that listens on this path for a moment, since the vhost-user library needs a listening
    /// socket.
    pub(super) fn connect(&self, path: &Path, vmm: i32, continues: bool) -> Result<UnixStream> {
        let (listener, file) = listen(path, Access::default())?;
        let stream = UnixStream::connect(path);
        file.remove();
        let stream = stream?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let body = [vmm, continues.into()].map(i32::to_ne_bytes);
        Message::new(SERVE, body.as_flattened(), vec![listener.into()]).send(&self.channel)?;
        Ok(stream)
    }

    /// Makes it complete its current messages, and end.
    pub(super) fn stop(&mut self) {
        // It may have ended already.
        let _ = self.channel.shutdown(Shutdown::Write);
        self.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        self.deadline = None;
        if let Err(error) = self.child.kill() {
            warn!("cannot kill the worker: {error}");
        }
    }

    /// How it has ended, if it has.
    pub(super) fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, with a timeout, and returns whether it has ended.
    pub(super) fn ends_within(&mut self, time: Duration) -> bool {
        let start = Instant::now();
        while self.status().is_none() {
            if start.elapsed() >= time {
                return false;
            }
            thread::sleep(INTERVAL);
        }
        true
    }

    /// Waits for its end, and kills it after a while.
    pub(super) fn wait(&mut self) {
        while self.status().is_none() {
            if self
                .deadline
                .is_some_and(|deadline| Instant::now() > deadline)
            {
                warn!("the worker does not end, and is killed");
                self.kill();
            }
            thread::sleep(INTERVAL);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.status().is_none() {
            self.kill();
            // The kernel ends it, however long that takes.
            let _ = self.child.wait();
        }
    }
}
