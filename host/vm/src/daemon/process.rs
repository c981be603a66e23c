// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon that is a child of this process.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balloon_control::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use service_manager::ServiceManager;
use tempfile::TempDir;

use super::runner::Runner;
use crate::stopwatch::{PATIENCE, Stopwatch};

/// A running daemon. It is killed when it is dropped.
#[derive(Debug)]
pub(super) struct Process {
    /// The program and its arguments.
    line: Vec<OsString>,
    child: Mutex<Child>,
    log: PathBuf,
    /// The length of the log of earlier processes.
    log_start: u64,
    /// The service manager that stores its file descriptors when it ends.
    manager: Option<ServiceManager>,
    /// The sockets and the state. Not in the checkout: the path of a socket has to be short.
    directory: TempDir,
}

impl Process {
    /// Starts `program` with `arguments`. It logs to a file in the directory `logs`.
    pub(super) fn start(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
        Self::start_in(tempfile::tempdir()?, None, program, logs, arguments)
    }

    /// The same as a service, which can be restarted while the guest runs.
    pub(super) fn start_service(program: &Path, logs: &Path, arguments: &[String]) -> Result<Self> {
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
        let process = Self {
            line,
            child: Mutex::new(child),
            log,
            log_start,
            manager,
            directory,
        };
        process.wait_ready()?;
        Ok(process)
    }

    fn wait_ready(&self) -> Result<()> {
        let stopwatch = Stopwatch::start(self.child().id());
        // The socket of a service exists before the service starts.
        let is_ready = || match &self.manager {
            Some(manager) => manager.is_ready(),
            None => Client::connect(&self.control()).is_ok(),
        };
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            if is_ready() {
                return Ok(());
            }
            if let Some(status) = self.child().try_wait()? {
                bail!(
                    "the daemon ends with {status}; its log is in {}",
                    self.log.display()
                );
            }
            ensure!(
                !is_over,
                "the daemon is not ready in {} s ({stopwatch}); its log is in {}",
                PATIENCE.as_secs(),
                self.log.display()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect("a lock")
    }
}

impl Runner for Process {
    fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    fn control(&self) -> PathBuf {
        control(&self.directory)
    }

    fn id(&self) -> Result<u32> {
        Ok(self.child().id())
    }

    fn log(&self) -> Result<String> {
        let text = fs::read(&self.log)?;
        let mine = text.get(usize::try_from(self.log_start)?..);
        Ok(String::from_utf8_lossy(mine.unwrap_or_default()).into_owned())
    }

    fn restart(&self, signal: Signal) -> Result<()> {
        let manager = self.manager.as_ref().context("the daemon is no service")?;
        let mut child = self.child();
        kill(Pid::from_raw(child.id().try_into()?), signal)?;
        child.wait()?;
        *child = spawn(&self.line, &self.log, Some(manager))?;
        drop(child);
        self.wait_ready()
    }

    fn end(&self) -> Result<()> {
        let mut child = self.child();
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
        let stopwatch = Stopwatch::start(child.id());
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "the daemon ends with {status}");
                return Ok(());
            }
            ensure!(
                !is_over,
                "the daemon does not end in {} s ({stopwatch}); its log is in {}",
                PATIENCE.as_secs(),
                self.log.display()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn kill(&self) -> Result<()> {
        let mut child = self.child();
        let id = child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        child.kill()?;
        for worker in children.split_whitespace() {
            // It may have ended with its parent.
            let _ = kill(Pid::from_raw(worker.parse()?), Signal::SIGKILL);
        }
        child.wait()?;
        Ok(())
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

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}
