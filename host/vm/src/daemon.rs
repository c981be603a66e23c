// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon that has the guest's balloon device.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balloon_control::{Client, Info, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::device::Offer;
use crate::qemu::Config;

/// How long it may take to start and to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running daemon. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Mutex<Child>,
    command: Mutex<Command>,
    /// The sockets and the state. Not in the checkout: the path of a socket has to be short.
    directory: TempDir,
}

impl Daemon {
    pub(crate) fn start(config: &Config) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut features = vec!["stats", "event-idx"];
        features.extend(config.offers.iter().filter_map(|offer| offer.feature()));
        let log = config.logs().join("daemon.log");

        let mut command = Command::new(&config.artifacts.daemon);
        command
            .arg("--socket")
            .arg(socket(&directory))
            .arg("--control")
            .arg(control(&directory))
            .arg("--state")
            .arg(directory.path().join("state"))
            .args(["--features", &features.join(",")])
            .args(
                config
                    .offers
                    .contains(&Offer::Extensions)
                    .then_some("--extensions"),
            )
            .args(&config.daemon_arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(log)?);
        let child = spawn(&mut command)?;
        let daemon = Self {
            child: Mutex::new(child),
            command: Mutex::new(command),
            directory,
        };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// The socket that QEMU connects to.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        control(&self.directory)
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
    /// It does not end in ten seconds, or ends with an error.
    pub fn end(&self) -> Result<()> {
        let mut child = self.child();
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "the daemon ends with {status}");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("the daemon does not end in {} s", PATIENCE.as_secs())
    }

    /// Kills it.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child();
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts it again after its end, with the same command line.
    pub fn restart(&self) -> Result<()> {
        *self.child() = spawn(&mut self.command.lock().expect("a lock"))?;
        self.wait_ready()
    }

    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Client::connect(&self.control()).is_err() {
            if let Some(status) = self.child().try_wait()? {
                bail!("the daemon ends with {status}; see its log");
            }
            ensure!(
                Instant::now() < deadline,
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

fn socket(directory: &TempDir) -> PathBuf {
    directory.path().join("vmm.sock")
}

fn control(directory: &TempDir) -> PathBuf {
    directory.path().join("control.sock")
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It fails only when the daemon has ended already.
        let _ = self.kill();
    }
}
