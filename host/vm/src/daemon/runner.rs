// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a scenario needs of a daemon, whether it is a child of this process or a unit of a system.

use std::fmt::Debug;
use std::path::PathBuf;

use anyhow::Result;
use nix::sys::signal::Signal;

use crate::container::Container;

/// What starts and ends the daemon.
pub(super) trait Runner: Debug + Send + Sync {
    /// The socket that QEMU connects to.
    fn socket(&self) -> PathBuf;

    /// The control socket.
    fn control(&self) -> PathBuf;

    /// The system whose unit the daemon is, if it is one.
    fn system(&self) -> Option<&Container> {
        None
    }

    /// The number of the process that keeps QEMU's connection.
    fn id(&self) -> Result<u32>;

    /// What the daemon has logged.
    fn log(&self) -> Result<String>;

    /// Ends the daemon with `signal`, and starts it again.
    fn restart(&self, signal: Signal) -> Result<()>;

    /// Ends the daemon as the system does when it goes down.
    fn end(&self) -> Result<()>;

    /// Kills all processes of the daemon, with no time for anything.
    fn kill(&self) -> Result<()>;
}
