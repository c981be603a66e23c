// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps the kernel from migrating a page: the page is in a pipe, too.

use std::io::IoSlice;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use nix::fcntl::{SpliceFFlags, vmsplice};
use nix::unistd::pipe;

use super::child::{PAGE_SIZE, Stop, report, touch_pages};

pub(super) fn run(stop: Stop) -> Result<()> {
    let mut page = MmapMut::map_anon(PAGE_SIZE).context("mapping a page")?;
    touch_pages(&mut page);
    page.lock().context("locking a page into memory")?;
    let (_reader, writer) = pipe().context("making a pipe")?;
    vmsplice(&writer, &[IoSlice::new(&page)], SpliceFFlags::empty())
        .context("splicing a page to a pipe")?;
    report(0, 1)?;
    stop.wait();
    Ok(())
}
