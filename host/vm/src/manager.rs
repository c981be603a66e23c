// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager that moves memory between guests.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balloon_control::Client;
use tempfile::TempDir;

use crate::guest::Guest;
use crate::stopwatch::{PATIENCE, Stopwatch};

/// A running manager. It is killed when it is dropped, and the balloons stay as they are until its leases run out.
#[derive(Debug)]
pub struct Manager {
    program: PathBuf,
    child: Child,
    log: PathBuf,
    /// The manager's socket, its configuration, and links to the control sockets of the VMs.
    directory: TempDir,
}

impl Manager {
    /// Starts `program` for these guests, each with its name. `settings` is the manager's configuration without the
    /// control sockets. The manager logs to a file in the directory `logs`, and records its decisions in another one.
    ///
    /// # Errors
    ///
    /// A guest has no daemon, or the manager does not start.
    pub fn start(
        program: &Path,
        logs: &Path,
        guests: &[(&str, &Guest)],
        settings: &str,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        for (name, guest) in guests {
            let vm = directory.path().join("vms").join(name);
            fs::create_dir_all(&vm)?;
            symlink(guest.daemon()?.control(), vm.join("control.sock"))?;
        }
        let sockets = directory.path().join("vms/*/control.sock");
        let config = directory.path().join("config.toml");
        fs::write(&config, format!("sockets = {sockets:?}\n{settings}"))?;
        fs::create_dir_all(logs)?;
        let log = logs.join("manager.log");
        let recording = logs.join("manager.jsonl");
        let child = Command::new(program)
            .arg("run")
            .arg("--config")
            .arg(&config)
            .arg("--socket")
            .arg(directory.path().join("control.sock"))
            .arg("--record")
            .arg(&recording)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("starting the manager")?;
        let mut manager = Self {
            program: program.to_owned(),
            child,
            log,
            directory,
        };
        manager.wait_ready()?;
        Ok(manager)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let socket = self.directory.path().join("control.sock");
        let stopwatch = Stopwatch::start(self.child.id());
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            if Client::connect(&socket).is_ok() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the manager ends with {status}: {}", self.log()?.trim_end());
            }
            ensure!(
                !is_over,
                "the manager is not ready in {} s ({stopwatch}); its log is in {}",
                PATIENCE.as_secs(),
                self.log.display()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Why a VM has the memory that it has, in the manager's words.
    pub fn explain(&self, vm: &str) -> Result<String> {
        let output = Command::new(&self.program)
            .args(["explain", vm, "--socket"])
            .arg(self.directory.path().join("control.sock"))
            .output()?;
        ensure!(
            output.status.success(),
            "the manager does not explain {vm}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What the manager has logged.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
