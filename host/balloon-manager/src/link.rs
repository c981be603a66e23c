// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connection to a balloon device, of either kind.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use balloon_policy::Sample;
use tokio::time::Instant;

use crate::balloon::{Balloon, Change, Outcome};
use crate::daemon::Connection;
use crate::qemu::{Monitor, Past};
use crate::resident::Memory;

/// Where a balloon device is controlled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// The control socket of a vhost-user-balloon daemon.
    Daemon(PathBuf),
    /// The socket of a monitor of QEMU's (QMP), whose VM has QEMU's own balloon device.
    Qemu(PathBuf),
}

impl Place {
    /// The name of the VM: that of the socket's directory, if the socket has a daemon's usual name, or else that of the
    /// socket.
    pub(crate) fn name(&self) -> String {
        let (Self::Daemon(path) | Self::Qemu(path)) = self;
        let usual = path.file_name().is_some_and(|name| name == "control.sock");
        let named = match usual {
            true => path.parent().and_then(Path::file_name),
            false => path.file_stem(),
        };
        named.unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Daemon(path) | Self::Qemu(path)) = self;
        path.display().fmt(f)
    }
}

/// A connection to a balloon device.
#[derive(Debug)]
pub(crate) enum Link {
    Daemon(Connection),
    Qemu(Monitor),
}

impl Link {
    /// Connects. QEMU does not report its target: `past` is what is known of it.
    pub(crate) async fn open(place: &Place, past: Option<Past>) -> Result<Self> {
        match place {
            Place::Daemon(path) => Ok(Self::Daemon(Connection::open(path).await?)),
            Place::Qemu(path) => {
                let mut monitor = Monitor::open(path).await?;
                if let Some(past) = past {
                    monitor.resume(past).await?;
                }
                Ok(Self::Qemu(monitor))
            }
        }
    }

    /// The process with the device.
    pub(crate) fn pid(&self) -> Option<i32> {
        match self {
            Self::Daemon(connection) => connection.pid(),
            Self::Qemu(monitor) => monitor.pid(),
        }
    }

    /// What the host has given to a VM with so much memory, in bytes, if the manager may look at it.
    pub(crate) fn resident(&self, memory: &mut Memory, all: u64) -> Option<u64> {
        let pid = self.pid()?;
        let files = memory.resident(pid, all);
        match self {
            Self::Daemon(_) => files,
            Self::Qemu(_) => files.or_else(|| memory.of_process(pid)),
        }
    }

    pub(crate) async fn balloon(&mut self) -> Result<Balloon> {
        match self {
            Self::Daemon(connection) => connection.balloon().await,
            Self::Qemu(monitor) => monitor.balloon().await,
        }
    }

    /// Sets a target. QEMU does not compare the one before, and has no leases.
    pub(crate) async fn set(&mut self, change: Change) -> Result<Outcome> {
        match self {
            Self::Daemon(connection) => connection.set(change).await,
            Self::Qemu(monitor) => Ok(match monitor.set(change.target).await? {
                Some(reason) => Outcome::Refused(reason),
                None => Outcome::Set,
            }),
        }
    }

    /// The statistics that came with the state of the balloon. A daemon's come on a connection of their own.
    pub(crate) fn sample(&mut self, epoch: Instant) -> Option<Sample> {
        match self {
            Self::Daemon(_) => None,
            Self::Qemu(monitor) => monitor.sample(epoch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_have_the_names_of_their_directories_or_sockets() {
        let daemon = |path: &str| Place::Daemon(path.into()).name();
        assert_eq!(daemon("/run/vhost-user-balloon/web/control.sock"), "web");
        assert_eq!(daemon("/run/balloons/db.sock"), "db");
        assert_eq!(Place::Qemu("/run/qemu/db.qmp".into()).name(), "db");
    }
}
