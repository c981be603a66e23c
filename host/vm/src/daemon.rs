// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon that has the guest's balloon device.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balloon_control::{Client, Info, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use service_manager::ServiceManager;
use tempfile::TempDir;

use crate::stopwatch::Stopwatch;

/// How long it may take to start and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running daemon. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    /// The program and its arguments.
    line: Vec<OsString>,
    child: Mutex<Child>,
    log: PathBuf,
    /// How long the log of those before it is.
    log_start: u64,
    /// What keeps its file descriptors when it ends.
    manager: Option<ServiceManager>,
    /// The sockets and the state. Not in the checkout: the path of a socket has to be short.
    directory: TempDir,
}

/// The processes of a daemon at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processes(u32, Pid);

impl Daemon {
    /// Starts `program` with `arguments`, and has it log to a file in the directory `logs`.
    pub(crate) fn start(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
        Self::start_in(tempfile::tempdir()?, None, program, logs, arguments)
    }

    /// The same as a service, which can be restarted while the guest runs.
    pub(crate) fn start_service(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let manager = ServiceManager::new(directory.path())?;
        Self::start_in(directory, Some(manager), program, logs, arguments)
    }

    fn start_in(
        directory: TempDir,
        manager: Option<ServiceManager>,
        program: &Path,
        logs: &Path,
        arguments: &[String],
    ) -> Result<Self> {
        fs::create_dir_all(logs)?;
        let log = logs.join("daemon.log");
        let log_start = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let mut line = vec![program.into()];
        for (option, file) in [
            ("--socket", socket(&directory)),
            ("--control", control(&directory)),
            ("--state", directory.path().join("state")),
        ] {
            line.extend([option.into(), file.into_os_string()]);
        }
        line.extend(arguments.iter().map(OsString::from));
        let child = spawn(&line, &log, manager.as_ref())?;
        let daemon = Self {
            line,
            child: Mutex::new(child),
            log,
            log_start,
            manager,
            directory,
        };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Has it end as a service, and starts it again.
    ///
    /// # Errors
    ///
    /// It is no service, or does not start.
    pub fn restart(&self) -> Result<()> {
        self.restart_after(Signal::SIGTERM)
    }

    /// The same with no time for anything.
    pub fn kill_and_restart(&self) -> Result<()> {
        self.restart_after(Signal::SIGKILL)
    }

    fn restart_after(&self, signal: Signal) -> Result<()> {
        let manager = self.manager.as_ref().context("the daemon is no service")?;
        let mut child = self.child();
        kill(Pid::from_raw(child.id().try_into()?), signal)?;
        child.wait()?;
        *child = spawn(&self.line, &self.log, Some(manager))?;
        drop(child);
        self.wait_ready()
    }

    /// The socket that QEMU connects to.
    pub fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        control(&self.directory)
    }

    /// What it has logged.
    pub fn log(&self) -> Result<String> {
        let text = fs::read(&self.log)?;
        let mine = text.get(usize::try_from(self.log_start)?..);
        Ok(String::from_utf8_lossy(mine.unwrap_or_default()).into_owned())
    }

    /// Asks it for something.
    pub fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let mut client = Client::connect(&self.control())?;
        Ok(client.call(request)?.parse()?)
    }

    /// What it knows of the balloon and of the guest.
    pub fn info(&self) -> Result<Info> {
        self.call(&Request::Info {})
    }

    /// Has it end as it does when the system goes down.
    ///
    /// # Errors
    ///
    /// It does not end in twenty seconds, or ends with an error.
    pub fn end(&self) -> Result<()> {
        let mut child = self.child();
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
        let stopwatch = Stopwatch::start(child.id());
        while !stopwatch.has_passed(PATIENCE) {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "the daemon ends with {status}");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("the daemon does not end in {} s", PATIENCE.as_secs())
    }

    /// The number of the process that keeps QEMU's connection.
    pub(crate) fn id(&self) -> u32 {
        self.child().id()
    }

    /// The process that has the device, a child of the daemon's own.
    pub fn worker(&self) -> Result<Pid> {
        let pid = self.child().id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let child = children.split_whitespace().next();
        Ok(Pid::from_raw(
            child.context("the daemon has no child")?.parse()?,
        ))
    }

    /// The processes of the daemon: the one that keeps QEMU's connection, and the one that has the device.
    pub fn processes(&self) -> Result<Processes> {
        Ok(Processes(self.id(), self.worker()?))
    }

    /// Has the process with the device stop where it is. It still exists.
    pub fn stop_worker(&self) -> Result<()> {
        Ok(kill(self.worker()?, Signal::SIGSTOP)?)
    }

    /// Kills all of its processes, with no time for anything.
    pub fn kill(&self) -> Result<()> {
        let worker = self.worker()?;
        let mut child = self.child();
        child.kill()?;
        // It may have ended with its parent.
        let _ = kill(worker, Signal::SIGKILL);
        child.wait()?;
        Ok(())
    }

    /// Kills the process that has the device.
    pub fn kill_worker(&self) -> Result<()> {
        Ok(kill(self.worker()?, Signal::SIGKILL)?)
    }

    /// Has the daemon replace both of its processes, as after an update.
    pub fn replace_processes(&self) -> Result<()> {
        let pid = self.child().id().try_into()?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGHUP)?)
    }

    fn wait_ready(&self) -> Result<()> {
        let stopwatch = Stopwatch::start(self.id());
        // The socket of a service is there before the service.
        let is_ready = || match &self.manager {
            Some(manager) => manager.is_ready(),
            None => Client::connect(&self.control()).is_ok(),
        };
        while !is_ready() {
            if let Some(status) = self.child().try_wait()? {
                bail!("the daemon ends with {status}; see its log");
            }
            ensure!(
                !stopwatch.has_passed(PATIENCE),
                "the daemon is not ready in {} s",
                PATIENCE.as_secs()
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect("a lock")
    }
}

fn spawn(line: &[OsString], log: &Path, manager: Option<&ServiceManager>) -> Result<Child> {
    let (program, arguments) = line.split_first().context("a program")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::options().create(true).append(true).open(log)?);
    if let Some(manager) = manager {
        manager.prepare(&mut command)?;
    }
    command.spawn().context("starting the daemon")
}

fn socket(directory: &TempDir) -> PathBuf {
    directory.path().join("vmm.sock")
}

fn control(directory: &TempDir) -> PathBuf {
    directory.path().join("control.sock")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}
