// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for front ends and serving them, one after the other.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use balloon_control::{Server, SocketFile, listen};
use log::{info, warn};
use nix::errno::Errno;
use nix::sys::socket;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use crate::config::Fields;
use crate::device::Device;
use crate::options::Options;
use crate::relay::relay;
use crate::state::{Saver, State};

/// How long to wait when the system has no file descriptor for another front end.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// A daemon with its sockets, before it waits for front ends.
#[derive(Debug)]
pub struct Daemon {
    device: Arc<Device>,
    socket: SocketFile,
    /// Where the library is met, which takes connections from listening sockets only.
    inner: PathBuf,
    /// Answered until this is dropped.
    control: Option<Server>,
    stop: Stop,
}

/// What ends a daemon, from any thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<Stopping>);

#[derive(Debug)]
struct Stopping {
    stopped: AtomicBool,
    listener: UnixListener,
    /// The front end that is being served.
    front: Mutex<Option<UnixStream>>,
}

impl Stop {
    /// Has the daemon end when all that it is doing is done.
    pub fn stop(&self) {
        self.0.stopped.store(true, SeqCst);
        let front = self.0.front.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(front) = &*front {
            // One that is gone already needs no more.
            let _ = front.shutdown(Shutdown::Both);
        }
        // This wakes the thread that waits for a front end, and fails for no listening socket.
        let _ = socket::shutdown(self.0.listener.as_raw_fd(), socket::Shutdown::Both);
    }

    fn stopped(&self) -> bool {
        self.0.stopped.load(SeqCst)
    }

    fn set_front(&self, front: Option<UnixStream>) {
        *self.0.front.lock().unwrap_or_else(PoisonError::into_inner) = front;
    }
}

impl Daemon {
    /// Makes a device with its sockets.
    ///
    /// # Errors
    ///
    /// There is another daemon on one of the sockets, the state file is of something else, or the system
    /// lacks something.
    pub fn new(options: &Options) -> Result<Self> {
        let socket = options.socket.as_deref().context("name a --socket")?;
        let state = options.state.as_deref().map(State::load).transpose()?;
        let state = state.flatten().unwrap_or_else(|| State {
            config: Fields::default(),
            stats_interval: options.stats_interval,
        });
        let saver = options.state.clone().map(Saver::start).transpose()?;
        let device = Arc::new(Device::new(options.settings(), state, saver)?);
        let mut inner = socket.as_os_str().to_owned();
        inner.push(".library");
        let (listener, socket) = listen(socket)?;
        let stop = Stop(Arc::new(Stopping {
            stopped: AtomicBool::new(false),
            listener,
            front: Mutex::default(),
        }));
        let control = options
            .control
            .as_deref()
            .map(|path| Server::bind(path, Arc::clone(&device) as _))
            .transpose()?;
        Ok(Self {
            device,
            socket,
            inner: inner.into(),
            control,
            stop,
        })
    }

    /// What ends it.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Where the control socket is.
    pub fn control(&self) -> Option<&Path> {
        self.control.as_ref().map(Server::path)
    }

    /// Serves front ends until it is stopped.
    ///
    /// # Errors
    ///
    /// The socket fails.
    pub fn run(self) -> Result<()> {
        loop {
            let front = match self.stop.0.listener.accept() {
                _ if self.stop.stopped() => return Ok(()),
                Ok((front, _)) => front,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) if exhausted(&error) => {
                    warn!("cannot serve a VMM now: {error}");
                    thread::sleep(EXHAUSTED_PAUSE);
                    continue;
                }
                Err(error) => return Err(error).context("waiting for a VMM"),
            };
            if let Err(error) = self.serve(&front) {
                warn!("a VMM cannot be served: {error:#}");
            }
        }
    }

    fn serve(&self, front: &UnixStream) -> Result<()> {
        let device = &self.device;
        let name = "vhost-user".to_owned();
        let mut library = VhostUserDaemon::new(name, Arc::clone(device), device.memory())
            .map_err(|error| anyhow!("{error}"))?;
        let (listener, file) = listen(&self.inner)?;
        let back = UnixStream::connect(&self.inner)?;
        file.remove();
        library
            .start(&mut Listener::from(listener))
            .map_err(|error| anyhow!("{error}"))?;
        for worker in library.get_epoll_handlers() {
            device.connect(&worker)?;
        }

        self.stop.set_front(Some(front.try_clone()?));
        // A stop that came before found no front end to shut down.
        if !self.stop.stopped() {
            relay(front, &back, &device.channel);
        }
        self.stop.set_front(None);

        drop(back);
        if let Err(error) = library.wait() {
            info!("the VMM's connection has ended: {error}");
        }
        // This waits for the worker to finish with what it has taken from the queues.
        drop(library);
        device.disconnect();
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.socket.remove();
    }
}

/// Whether there is no file descriptor left.
fn exhausted(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}
