// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Common code for the agent's child processes.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use agent::Exit;

/// How a process ended, as a type of the protocol.
pub(crate) fn exit(status: ExitStatus) -> Exit {
    match status.code() {
        Some(code) => Exit::Status(code),
        None => Exit::Signal(status.signal().expect("what did not exit was killed")),
    }
}
