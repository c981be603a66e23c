// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leaves the free memory in single pages, between pages that are in use.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{MIB, PAGE_SIZE, Stop, report};

pub(super) fn run(mib: usize, stop: Stop) -> Result<()> {
    // Pages of a memory file, unlike anonymous ones, are given back one at a time in safe code.
    let file = memfd_create("fragment", MFdFlags::MFD_CLOEXEC)?;
    let size = mib * MIB;
    fallocate(file.as_fd(), FallocateFlags::empty(), 0, size.try_into()?)
        .context("taking the memory")?;
    for page in (0..size).step_by(2 * PAGE_SIZE) {
        fallocate(
            file.as_fd(),
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            page.try_into()?,
            PAGE_SIZE.try_into()?,
        )
        .context("giving a page back")?;
    }
    report(mib / 2, 1)?;
    stop.wait();
    Ok(())
}
