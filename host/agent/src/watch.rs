// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for an attribute in sysfs to change.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The value of `attribute` after the kernel has announced a change that `cause` triggers.
pub(crate) fn change(
    attribute: &str,
    timeout_ms: u64,
    cause: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let mut file = File::open(attribute).with_context(|| format!("opening {attribute}"))?;
    let mut text = String::new();
    // The kernel announces changes only to readers of the attribute.
    file.read_to_string(&mut text)?;
    cause()?;
    let announced = poll(
        &mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)],
        PollTimeout::try_from(timeout_ms)?,
    )?;
    ensure!(announced == 1, "no change of {attribute} is announced");
    text.clear();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}
