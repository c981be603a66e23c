// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process that has the device: waits for front ends, which the keeper lets through to it, and serves
//! them, one after the other.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use balloon_control::{Access, Server, SocketFile, listen};
use log::{debug, warn};
use nix::sys::socket;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use crate::channel::Channel;
use crate::device::Device;
use crate::options::Options;
use crate::state::State;

/// How long to wait when the system has no file descriptor for another front end.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// A device with its sockets, before it waits for front ends.
pub struct Daemon {
    device: Arc<Device>,
    listener: Listener,
    socket: SocketFile,
    /// Answers until this is dropped.
    _control: Option<Server>,
    stop: Stop,
}

/// What ends a daemon, from any thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<Stopping>);

#[derive(Debug)]
struct Stopping {
    stopped: AtomicBool,
    listener: UnixListener,
}

impl Stop {
    /// Has the daemon end when it has no front end. Whoever wants it to end at once closes the connection.
    pub fn stop(&self) {
        self.0.stopped.store(true, SeqCst);
        // This wakes the thread that waits for a front end, and fails for no listening socket.
        let _ = socket::shutdown(self.0.listener.as_raw_fd(), socket::Shutdown::Both);
    }

    fn stopped(&self) -> bool {
        self.0.stopped.load(SeqCst)
    }
}

impl Daemon {
    /// Makes a device with its sockets, with a channel to the process that keeps the connection, and with that
    /// one's file for what is in the balloon.
    ///
    /// # Errors
    ///
    /// There is another daemon on one of the sockets, the state file is of something else, or the system
    /// lacks something.
    pub fn new(options: &Options, channel: Channel, kept: Option<File>) -> Result<Self> {
        let socket = options.worker.as_deref().context("name a socket")?;
        let state = options.state.as_deref().map(State::load).transpose()?;
        let state = state
            .flatten()
            .unwrap_or_else(|| State::new(options.stats_interval));
        let path = options.state.clone();
        let device = Arc::new(Device::new(options.settings(), state, path, channel, kept)?);
        let (listener, socket) = listen(socket, Access::default())?;
        let stop = Stop(Arc::new(Stopping {
            stopped: AtomicBool::new(false),
            listener: listener.try_clone()?,
        }));
        let control = options
            .control
            .as_deref()
            .map(|path| Server::bind(path, Arc::clone(&device) as _))
            .transpose()?;
        Ok(Self {
            device,
            listener: listener.into(),
            socket,
            _control: control,
            stop,
        })
    }

    /// What ends it.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Serves front ends until it is stopped.
    ///
    /// # Errors
    ///
    /// The system lacks something.
    pub fn run(mut self) -> Result<()> {
        while !self.stop.stopped() {
            let device = &self.device;
            let name = "vhost-user".to_owned();
            let mut library = VhostUserDaemon::new(name, Arc::clone(device), device.memory())
                .map_err(|error| anyhow!("{error}"))?;
            if let Err(error) = library.start(&mut self.listener) {
                if !self.stop.stopped() {
                    warn!("cannot serve a VMM now: {error}");
                    thread::sleep(EXHAUSTED_PAUSE);
                }
                continue;
            }
            for worker in library.get_epoll_handlers() {
                device.connect(&worker)?;
            }
            if let Err(error) = library.wait() {
                debug!("the connection has ended: {error}");
            }
            // This waits for the worker to finish with what it has taken from the queues.
            drop(library);
            device.disconnect();
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.socket.remove();
    }
}
