// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon that is a unit of systemd.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::runner::Runner;
use crate::container::{Container, System};

/// The unit, as its package has installed it.
const UNIT: &str = "vhost-user-balloon@vm.service";

/// The directory of its sockets.
const SOCKETS: &str = "/run/vhost-user-balloon/vm";

/// A running unit, in a system of its own. The system ends when this is dropped.
#[derive(Debug)]
pub(super) struct Unit {
    system: Container,
    /// The directory of the sockets for processes outside of the system.
    sockets: PathBuf,
    /// The file to which the system's log is written at the end.
    log: PathBuf,
}

impl Unit {
    /// Boots `system`, and starts the unit there with `arguments`.
    pub(super) fn start(system: &System, logs: &Path, arguments: &[String]) -> Result<Self> {
        fs::create_dir_all(logs)?;
        let system = Container::boot(system, &logs.join("systemd.log"))?;
        let options = system.path("/etc/vhost-user-balloon")?;
        fs::create_dir_all(&options)?;
        let line = format!("OPTIONS={}\n", arguments.join(" "));
        fs::write(options.join("vm.conf"), line)?;
        // The package starts the manager, which would set targets of its own.
        system.run("systemctl", &["stop", "balloon-manager"])?;
        system.run("systemctl", &["start", UNIT])?;
        let sockets = system.path(SOCKETS)?;
        Ok(Self {
            system,
            sockets,
            log: logs.join("journal.log"),
        })
    }
}

impl Runner for Unit {
    fn socket(&self) -> PathBuf {
        self.sockets.join("vmm.sock")
    }

    fn control(&self) -> PathBuf {
        self.sockets.join("control.sock")
    }

    fn system(&self) -> Option<&Container> {
        Some(&self.system)
    }

    fn id(&self) -> Result<u32> {
        let arguments = ["show", "--property=MainPID", "--value", UNIT];
        let id = self.system.run("systemctl", &arguments)?;
        self.system.outside(id.trim().parse()?)
    }

    fn log(&self) -> Result<String> {
        self.system
            .run("journalctl", &["--output=cat", "--unit", UNIT])
    }

    fn restart(&self, signal: Signal) -> Result<()> {
        match signal {
            Signal::SIGTERM => self.system.run("systemctl", &["restart", UNIT])?,
            // systemd starts it again by itself.
            _ => {
                let signal = format!("--signal={signal}");
                self.system
                    .run("systemctl", &["kill", &signal, "--kill-whom=main", UNIT])?
            }
        };
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.system.run("systemctl", &["stop", UNIT])?;
        Ok(())
    }

    fn kill(&self) -> Result<()> {
        self.system
            .run("systemctl", &["kill", "--signal=KILL", UNIT])?;
        Ok(())
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // The log is useful only after a failure, and the failure may be the system's own.
        if let Ok(log) = self.system.run("journalctl", &["--no-pager"]) {
            let _ = fs::write(&self.log, log);
        }
    }
}
