// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager's processor time with the control sockets of many VMs: `make bench-manager`.
//!
//! The daemons are simulated, each with statistics at the interval that the manager wants. First all guests are at rest.
//! Then some of them use nearly all of their memory, so that the manager looks at them more often.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use balloon_control::{
    Changes, ControlError, ErrorKind, Guest, Handler, Info, Lease, Request, Response, Server, Stat,
    Stats,
};
use procfs::process::Process;

const PROGRAM: &str = env!("CARGO_BIN_EXE_balloon-manager");

/// How many VMs there are, and how many of them are busy in the end.
const VMS: usize = 100;
const BUSY: usize = 10;

const GIB: u64 = 1 << 30;
const MEMORY: u64 = 4 * GIB;

/// What a guest uses at rest, and what a busy one leaves of its memory.
const USED: u64 = GIB;
const LEFT: u64 = 32 << 20;

/// The pool has room for the guests at rest, and for what the busy ones need.
const SETTINGS: &str = "[host]\npool = '300GiB'\nreserve = '4GiB'\n";

/// The time in which the manager divides the pool, and the time that is measured.
const SETTLE: Duration = Duration::from_secs(40);
const MEASURE: Duration = Duration::from_secs(30);

/// The share of a processor that the manager may take at rest.
const LIMIT: f64 = 0.02;

#[derive(Debug, Default)]
struct State {
    target: u64,
    lease: Option<Lease>,
    is_busy: bool,
    interval: Option<Duration>,
    sequence: u64,
}

/// A daemon and its guest, whose balloon follows the target at once.
#[derive(Debug, Default)]
struct Daemon {
    state: Mutex<State>,
    changes: Changes,
}

impl Daemon {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Sends statistics at the interval that the manager wants.
    fn run(&self) {
        loop {
            let interval = self.state().interval;
            thread::sleep(interval.unwrap_or(Duration::from_millis(100)));
            if interval.is_some() {
                self.state().sequence += 1;
                self.changes.stats();
            }
        }
    }
}

impl Handler for Daemon {
    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn sample_every(&self, interval: Option<Duration>) {
        self.state().interval = interval;
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        let mut state = self.state();
        let usable = MEMORY - state.target;
        match request {
            Request::Info {} => Ok(Response::Info(Info {
                target: state.target,
                size: state.target,
                held: state.target,
                resident: Some(USED.min(usable)),
                memory: Some(MEMORY),
                shared: Some(MEMORY),
                lease: state.lease.clone(),
                granule: 4096,
                guest: Guest {
                    connected: true,
                    driver: true,
                    features: vec!["stats".to_owned(), "pressure".to_owned()],
                    ..Guest::default()
                },
                ..Info::default()
            })),
            Request::Subscribe { .. } => Ok(Response::Subscribed {}),
            Request::Set {
                bytes,
                lease,
                fallback,
                owner,
                ..
            } => {
                state.target = bytes;
                state.lease = lease.map(|remaining| Lease {
                    remaining,
                    fallback: fallback.unwrap_or(0),
                    owner,
                });
                drop(state);
                self.changes.info();
                Ok(Response::Done {})
            }
            Request::Stats { .. } => {
                let available = match state.is_busy {
                    true => LEFT,
                    // It varies, as that of a real guest.
                    false => usable.saturating_sub(USED) + ((state.sequence % 7) << 20),
                };
                Ok(Response::Stats(Stats {
                    sequence: state.sequence,
                    values: BTreeMap::from([
                        (Stat::FreeMemory, available),
                        (Stat::AvailableMemory, available),
                        (Stat::TotalMemory, MEMORY),
                        (Stat::AllocStalls, 0),
                    ]),
                    ..Stats::default()
                }))
            }
            _ => Err(ControlError::new(ErrorKind::Unsupported, "no", "no")),
        }
    }
}

/// The running manager.
struct Manager(Child);

impl Manager {
    fn start(directory: &Path) -> Self {
        let config = directory.join("config.toml");
        let sockets = directory.join("*/control.sock");
        let text = format!("sockets = '{}'\n{SETTINGS}", sockets.display());
        fs::write(&config, text).unwrap();
        let child = Command::new(PROGRAM)
            .args(["run", "--log", "warn", "--config"])
            .arg(config)
            .arg("--socket")
            .arg(directory.join("manager.sock"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Its processor time so far.
    fn time(&self) -> f64 {
        let process = Process::new(self.0.id().try_into().unwrap()).unwrap();
        let stat = process.stat().unwrap();
        (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
    }

    /// The part of a processor that it takes from now on.
    fn measure(&self) -> f64 {
        let (start, before) = (Instant::now(), self.time());
        thread::sleep(MEASURE);
        (self.time() - before) / start.elapsed().as_secs_f64()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() -> ExitCode {
    let directory = tempfile::tempdir().unwrap();
    let daemons: Vec<_> = (0..VMS).map(|_| Arc::new(Daemon::default())).collect();
    let mut servers = Vec::new();
    for (number, daemon) in daemons.iter().enumerate() {
        let vm = directory.path().join(format!("vm{number}"));
        fs::create_dir(&vm).unwrap();
        let handler = Arc::clone(daemon);
        servers.push(Server::bind(&vm.join("control.sock"), handler).unwrap());
        let daemon = Arc::clone(daemon);
        thread::spawn(move || daemon.run());
    }
    let manager = Manager::start(directory.path());
    thread::sleep(SETTLE);
    let resting = manager.measure();
    println!(
        "{VMS} VMs at rest: {:.2} % of a processor (limit {:.0} %)",
        resting * 100.0,
        LIMIT * 100.0
    );
    for daemon in daemons.iter().take(BUSY) {
        daemon.state().is_busy = true;
    }
    let busy = manager.measure();
    println!(
        "{BUSY} of them short of memory: {:.2} % of a processor",
        busy * 100.0
    );
    match resting < LIMIT {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
