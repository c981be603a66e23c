// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operations of a daemon, whether it is a child of this process or a unit of a system.

use std::fmt::Debug;
use std::path::PathBuf;

use anyhow::Result;
use nix::sys::signal::Signal;

use crate::container::Container;

/// Starts and ends the daemon.
pub(super) trait Runner: Debug + Send + Sync {
    /// The socket that QEMU connects to.
    fn socket(&self) -> PathBuf;

    /// The control socket.
    fn control(&self) -> PathBuf;

    /// The system whose unit the daemon is, if it is one.
    fn system(&self) -> Option<&Container> {
        None
    }

    /// The process id of the supervisor.
    fn id(&self) -> Result<u32>;

    /// The log of the daemon.
    fn log(&self) -> Result<String>;

    /// Ends the daemon with `signal`, and starts it again.
    fn restart(&self, signal: Signal) -> Result<()>;

    /// Ends the daemon as a system shutdown does.
    fn end(&self) -> Result<()>;

    /// Kills all processes of the daemon.
    fn kill(&self) -> Result<()>;
}
