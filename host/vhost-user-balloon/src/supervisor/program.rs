// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's program, for its other processes.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The running program, also when its file has been replaced or removed.
pub(super) const SELF: &str = "/proc/self/exe";

/// The option of a supervisor that continues where this one ends.
pub(super) const RESUME: &str = "--resume";

/// The path at which this program was started.
pub(super) fn own_path() -> io::Result<PathBuf> {
    let path = env::current_exe()?.into_os_string();
    // The kernel adds this suffix if the program was replaced.
    let path = path
        .as_bytes()
        .strip_suffix(b" (deleted)")
        .map_or_else(|| path.clone(), |path| OsStr::from_bytes(path).to_owned());
    Ok(path.into())
}

/// Runs a program as another process of this daemon.
pub(super) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg0("vhost-user-balloon");
    // These variables describe file descriptors that this process has received.
    for variable in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        command.env_remove(variable);
    }
    command
}
