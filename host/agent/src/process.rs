// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the agent's child processes have in common.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use agent::Exit;

/// How a process ended, in the protocol's words.
pub(crate) fn exit(status: ExitStatus) -> Exit {
    match status.code() {
        Some(code) => Exit::Status(code),
        None => Exit::Signal(status.signal().expect("what did not exit was killed")),
    }
}
