// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The supervisor: keeps the VMM's connection while workers are replaced.
//!
//! QEMU's generic vhost-user device does not reconnect. Once its connection has ended, the guest has a dead
//! device, and QEMU aborts at the next access to the configuration space. So a small process that reads no
//! data of the guest holds the connection. Another process, the [`worker`], implements the device. The
//! supervisor records the messages that set up the device in the [`journal`], and sends them to the next
//! worker after a crash. A [`snapshot`] of that state outlives the supervisor, too.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, io, mem};

use anyhow::{Context, Result};
use log::info;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

mod configuration;
mod connection;
mod forward;
pub mod journal;
mod memory;
mod optional;
mod program;
mod recovery;
mod setup;
mod snapshot;
mod socket;
mod update;
mod vmm;
mod worker;

use crate::options::Options;
use crate::virtio::features::Feature;
use connection::Connection;
use journal::Journal;
use program::{RESUME, SELF, own_path};
use snapshot::{Current, Listening, Snapshot, Store, notify};
use socket::Socket;
use vmm::Vmm;
use worker::Worker;

/// How long a front end waits for another worker before the supervisor answers in its place.
const ABSENCE: Duration = Duration::from_millis(50);

/// Serves front ends until a signal ends the process.
///
/// # Errors
///
/// The socket is in use, or the worker does not start.
pub fn run(options: &Options) -> Result<()> {
    let received = options.fd.map(socket::take);
    let signals = signals()?;
    let stdin = io::stdin();
    let (store, snapshot) = Store::open(options.resume.then(|| stdin.as_fd()));
    let mut supervisor = Supervisor::new(options, received, signals, store, snapshot)?;
    let result = supervisor.run();
    supervisor.end();
    result
}

/// Blocks the signals that the supervisor waits for.
fn signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&signals, flags)?)
}

/// The result of a run of the loop.
enum Event {
    Continue,
    Stop,
}

/// An event.
struct Ready {
    signal: bool,
    client: bool,
    worker: bool,
    backend: bool,
    frontend: bool,
    /// Whether the next message of the front end was waited for.
    reads: bool,
}

#[derive(Debug)]
struct Supervisor {
    /// The program that takes over after an update.
    program: PathBuf,
    /// The running program, and the one before it if it has replaced that.
    own_program: OwnedFd,
    old_program: Option<OwnedFd>,
    signals: SignalFd,
    socket: Socket,
    control: Option<Socket>,
    /// The state file if it is removed at the end of the daemon.
    own_state: Option<PathBuf>,
    store: Store,
    /// The file with the balloon's state, for the workers.
    kept: File,
    /// The arguments of workers, and those for the next front end.
    arguments: Vec<OsString>,
    new_arguments: Vec<OsString>,
    worker: Option<Worker>,
    /// The worker's connection for the front end's messages.
    backend: Option<UnixStream>,
    /// When that connection ended.
    absent_since: Instant,
    /// Whether the worker should end.
    stopping: bool,
    /// Whether a child process has ended since the worker was checked.
    child_ended: bool,
    /// When to start the next worker.
    start_at: Instant,
    failures: u32,
    /// A worker of a new program, as a trial.
    trial: Option<Worker>,
    vmm: Option<Vmm>,
    /// The interval of systemd's watchdog, and the last notification.
    watchdog: Option<Duration>,
    notified: Instant,
    /// Whether a worker has been ready.
    is_ready: bool,
    /// Whether this one continues another supervisor.
    resumed: bool,
    /// How long a guest may take to boot.
    boot: Duration,
}

impl Supervisor {
    fn new(
        options: &Options,
        received: Option<Result<Listening>>,
        signals: SignalFd,
        store: Store,
        snapshot: Option<Snapshot>,
    ) -> Result<Self> {
        let program = own_path().context("finding this program")?;
        let own_program = File::open(SELF)?.into();
        let resumed = snapshot.is_some();
        let Snapshot {
            socket,
            control,
            program: old_program,
            kept,
            arguments: old_arguments,
            frontend,
        } = snapshot.map_or_else(Snapshot::empty, Ok)?;
        let boot = Duration::from_secs(options.boot_grace.into());
        let vmm = connected(frontend, boot);
        let (socket, control) = sockets(options, received, socket, control)?;
        let own_state = own_state(options, &socket, vmm.is_some());
        let new_arguments = worker_arguments(options, own_state.as_deref());
        let arguments = match vmm {
            Some(_) => continue_with(old_arguments, &new_arguments),
            None => new_arguments.clone(),
        };
        let now = Instant::now();
        Ok(Self {
            program,
            own_program,
            old_program,
            signals,
            socket,
            control,
            own_state,
            store,
            kept: File::from(kept),
            arguments,
            new_arguments,
            worker: None,
            backend: None,
            absent_since: now,
            stopping: false,
            child_ended: false,
            start_at: now,
            failures: 0,
            trial: None,
            vmm,
            watchdog: sd_notify::watchdog_enabled().map(|limit| limit / 4),
            notified: now,
            is_ready: false,
            resumed,
            boot,
        })
    }

    fn run(&mut self) -> Result<()> {
        self.save();
        loop {
            self.advance()?;
            if let Event::Stop = self.wait()? {
                return Ok(());
            }
            if self
                .watchdog
                .is_some_and(|interval| self.notified.elapsed() >= interval)
            {
                notify(&[NotifyState::Watchdog]);
                self.notified = Instant::now();
            }
        }
    }

    /// Puts the worker and the sockets into the state that the next supervisor expects.
    fn end(&mut self) {
        notify(&[NotifyState::Stopping]);
        self.stop_worker();
        if self.store.is_persistent() {
            return;
        }
        self.socket.remove();
        if let Some(control) = &self.control {
            control.remove();
        }
        if let Some(state) = &self.own_state {
            // None if nothing has changed.
            let _ = fs::remove_file(state);
        }
    }

    fn save(&mut self) {
        let mut store = mem::take(&mut self.store);
        store.save(&Snapshot {
            program: Some(self.own_program.as_fd()),
            ..self.snapshot()
        });
        self.store = store;
    }

    /// The snapshot, without a fallback program.
    fn snapshot(&self) -> Current<'_> {
        Snapshot {
            socket: Some(self.socket.current()),
            control: self.control.as_ref().map(Socket::current),
            program: None,
            kept: self.kept.as_fd(),
            arguments: self.arguments.clone(),
            frontend: self.vmm.as_ref().map(|vmm| (&vmm.connection, &vmm.journal)),
        }
    }

    /// The timeout of the next wait.
    fn timeout(&self) -> PollTimeout {
        const TICK: u16 = 20;
        const LONG: u16 = 10_000;
        let in_progress =
            |vmm: &Vmm| vmm.pending.is_some() || vmm.setup.is_pending() || self.backend.is_none();
        let worker = self.worker.as_ref();
        if worker.is_none_or(|worker| worker.deadline().is_some())
            || self.trial.is_some()
            || self.vmm.as_ref().is_some_and(in_progress)
        {
            return TICK.into();
        }
        let watchdog = self
            .watchdog
            .and_then(|interval| u16::try_from(interval.as_millis()).ok());
        let driver = self.vmm.as_ref().and_then(|vmm| vmm.setup.driver_due());
        let driver = driver.and_then(|due| {
            let rest = due.saturating_duration_since(Instant::now());
            u16::try_from(rest.as_millis() + 1).ok()
        });
        let timeouts = [watchdog, driver].into_iter().flatten();
        timeouts.fold(LONG, u16::min).into()
    }

    /// Waits for an event.
    fn poll(&self) -> Result<Ready> {
        let vmm = self.vmm.as_ref();
        let reads = vmm.is_some_and(|vmm| {
            vmm.pending.is_none()
                && (self.backend.is_some()
                    || self.absent_since.elapsed() >= ABSENCE && !vmm.blocked)
        });
        let channel = self.worker.as_ref().filter(|worker| !worker.has_ended());
        let sources = [
            Some((self.signals.as_fd(), true)),
            Some((self.socket.listener.as_fd(), true)),
            channel.map(|worker| (worker.channel(), true)),
            self.backend.as_ref().map(|backend| (backend.as_fd(), true)),
            vmm.map(|vmm| (vmm.connection.socket().as_fd(), reads)),
        ];
        let mut events: Vec<_> = sources
            .iter()
            .flatten()
            .map(|(fd, wanted)| {
                let flags = if *wanted {
                    PollFlags::POLLIN
                } else {
                    PollFlags::empty()
                };
                PollFd::new(*fd, flags)
            })
            .collect();
        match poll(&mut events, self.timeout()) {
            // A debugger was attached, or the process was stopped for a while.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut events = events.iter().map(|event| event.any().unwrap_or(true));
        let [signal, client, worker, backend, frontend] =
            sources.map(|source| source.is_some() && events.next() == Some(true));
        Ok(Ready {
            signal,
            client,
            worker,
            backend,
            frontend,
            reads,
        })
    }

    /// Waits for events, and handles them.
    fn wait(&mut self) -> Result<Event> {
        let ready = self.poll()?;
        if ready.signal {
            while let Some(signal) = self.signals.read_signal()? {
                match Signal::try_from(i32::try_from(signal.ssi_signo)?) {
                    Ok(Signal::SIGCHLD) => self.child_ended = true,
                    Ok(Signal::SIGHUP) if self.trial.is_some() => {}
                    Ok(Signal::SIGHUP) => self.update(),
                    other => {
                        info!("ending on {}", other.map_or("a signal", Signal::as_str));
                        return Ok(Event::Stop);
                    }
                }
            }
        }
        if ready.worker {
            self.on_worker();
        }
        if ready.backend {
            self.on_answer();
        }
        if ready.frontend {
            self.on_frontend(ready.reads);
        }
        if ready.client {
            self.accept();
        }
        Ok(Event::Continue)
    }
}

/// The temporary state file, unless the options name another one.
fn own_state(options: &Options, socket: &Socket, is_connected: bool) -> Option<PathBuf> {
    if options.state.is_some() {
        return None;
    }
    let state = socket.with_suffix(".state");
    if !is_connected {
        // A file that remains from an earlier daemon belongs to another guest.
        let _ = fs::remove_file(&state);
    }
    Some(state)
}

/// The sockets of the options. Some may come from an earlier supervisor, which has the one that it has received.
fn sockets(
    options: &Options,
    received: Option<Result<Listening>>,
    socket: Option<Listening>,
    control: Option<Listening>,
) -> Result<(Socket, Option<Socket>)> {
    let socket = match received {
        Some(received) => Socket::received(socket.map_or(received, Ok)?)?,
        None => {
            let path = options.socket.as_deref().context("name a --socket")?;
            Socket::new(path, options.socket_access(), socket)?
        }
    };
    let control = options
        .control
        .as_deref()
        .map(|path| Socket::new(path, options.control_access(), control))
        .transpose()
        .inspect_err(|_| socket.remove())?;
    Ok((socket, control))
}

/// The front end of the earlier supervisor, unless it is gone.
fn connected(frontend: Option<(Connection, Journal)>, boot: Duration) -> Option<Vmm> {
    let (connection, journal) = frontend?;
    connection.resume().ok()?;
    let vmm = Vmm::new(connection, journal, boot);
    (!vmm.is_gone()).then_some(vmm)
}

/// The arguments of workers for the connected VMM do not change.
fn continue_with(old: Vec<OsString>, new: &[OsString]) -> Vec<OsString> {
    info!("continuing with the VMM that is connected");
    if old != new {
        info!("new options are used from the next VM on");
    }
    old
}

/// The arguments for a worker: those of this process, and the state file if they name none. The host's huge pages may
/// change while a VMM is connected, and each of its workers must offer the features that the driver has accepted.
fn worker_arguments(options: &Options, state: Option<&Path>) -> Vec<OsString> {
    let mut arguments: Vec<_> = env::args_os()
        .skip(1)
        .filter(|argument| argument != RESUME)
        .collect();
    if let Some(state) = state {
        arguments.extend(["--state".into(), state.into()]);
    }
    let features: Vec<_> = options.offered().iter().map(Feature::to_string).collect();
    arguments.push(format!("--features={}", features.join(",")).into());
    arguments
}
