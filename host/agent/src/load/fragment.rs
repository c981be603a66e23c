// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fragments the free memory into isolated pages between pages in use.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::child::{MIB, PAGE_SIZE, Stop, report};

/// How much memory has the free pages at even numbers, or at odd ones: not more than one of compaction's steps.
const STRETCH: usize = 32 * PAGE_SIZE;

pub(super) fn run(mib: usize, stop: Stop) -> Result<()> {
    // Safe code can free single pages of a memory file, unlike anonymous pages.
    let file = memfd_create("fragment", MFdFlags::MFD_CLOEXEC)?;
    let size = mib * MIB;
    fallocate(file.as_fd(), FallocateFlags::empty(), 0, size.try_into()?)
        .context("taking the memory")?;
    // Never two adjacent pages, wherever the pairs are in the guest's memory: they would not be
    // isolated.
    let mut given_back = None;
    for pair in (0..size).step_by(2 * PAGE_SIZE) {
        // A random one of the two: compaction searches free pages in steps of a power of two. If all
        // free pages were at even numbers, or at odd ones, it would find either none or all of them.
        let page = pair + PAGE_SIZE * coin(pair / STRETCH);
        if given_back.replace(page) == page.checked_sub(PAGE_SIZE) {
            continue;
        }
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

/// Zero or one, without a pattern and the same each time.
fn coin(number: usize) -> usize {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63
}
