// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon that implements the guest's balloon device.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use balloon_control::{Client, Info, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use crate::container::{Container, System};
use crate::daemon::process::Process;
use crate::daemon::runner::Runner;
use crate::daemon::unit::Unit;

mod process;
mod resources;
mod runner;
mod unit;

/// A running daemon. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon(Box<dyn Runner>);

/// The processes of a daemon at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processes(u32, Pid);

impl Daemon {
    /// Starts `program` with `arguments`. It logs to a file in the directory `logs`.
    pub(crate) fn start(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
        let process = Process::start(program, logs, arguments)?;
        Ok(Self(Box::new(process)))
    }

    /// The same as a service, which can be restarted while the guest runs.
    pub(crate) fn start_service(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
        let process = Process::start_service(program, logs, arguments)?;
        Ok(Self(Box::new(process)))
    }

    /// Boots a system, and starts the unit of its package there.
    pub(crate) fn start_unit(system: &System, logs: &Path, arguments: &[String]) -> Result<Self> {
        Ok(Self(Box::new(Unit::start(system, logs, arguments)?)))
    }

    /// The system whose unit it is.
    pub fn system(&self) -> Option<&Container> {
        self.0.system()
    }

    /// Stops the service, and starts it again.
    ///
    /// # Errors
    ///
    /// It is no service, or does not start.
    pub fn restart(&self) -> Result<()> {
        self.0.restart(Signal::SIGTERM)
    }

    /// The same by `SIGKILL`.
    pub fn kill_and_restart(&self) -> Result<()> {
        self.0.restart(Signal::SIGKILL)
    }

    /// The socket that QEMU connects to.
    pub fn socket(&self) -> PathBuf {
        self.0.socket()
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.0.control()
    }

    /// Its log.
    pub fn log(&self) -> Result<String> {
        self.0.log()
    }

    /// Sends a request.
    pub fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let mut client = Client::connect(&self.control())?;
        Ok(client.call(request)?.parse()?)
    }

    /// The response to `info`.
    pub fn info(&self) -> Result<Info> {
        self.call(&Request::Info {})
    }

    /// Ends it as a system shutdown does.
    ///
    /// # Errors
    ///
    /// It does not end in twenty seconds, or ends with an error.
    pub fn end(&self) -> Result<()> {
        self.0.end()
    }

    /// The process id of the supervisor.
    pub(crate) fn id(&self) -> Result<u32> {
        self.0.id()
    }

    /// The worker process, a child of the supervisor.
    pub fn worker(&self) -> Result<Pid> {
        let pid = self.id()?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let child = children.split_whitespace().next();
        Ok(Pid::from_raw(
            child.context("the daemon has no child")?.parse()?,
        ))
    }

    /// The processes of the daemon: supervisor and worker.
    pub fn processes(&self) -> Result<Processes> {
        Ok(Processes(self.id()?, self.worker()?))
    }

    /// Stops the worker with `SIGSTOP`. The process still exists.
    pub fn stop_worker(&self) -> Result<()> {
        Ok(kill(self.worker()?, Signal::SIGSTOP)?)
    }

    /// Kills all of its processes.
    pub fn kill(&self) -> Result<()> {
        self.0.kill()
    }

    /// Kills the worker.
    pub fn kill_worker(&self) -> Result<()> {
        Ok(kill(self.worker()?, Signal::SIGKILL)?)
    }

    /// Makes the daemon replace both of its processes, as after an update.
    pub fn replace_processes(&self) -> Result<()> {
        let pid = self.id()?.try_into()?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGHUP)?)
    }
}
