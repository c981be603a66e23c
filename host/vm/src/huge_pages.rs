// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's reserve of huge pages.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use procfs::{Current, Meminfo};

use crate::size::Size;

/// How many huge pages of the default size there are.
const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

/// Which mappings the host gives transparent huge pages.
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Held by the process that has changed that number.
static RESERVED: Mutex<()> = Mutex::new(());

/// Huge pages of 2 MiB that are reserved as long as this exists. There is one at a time.
#[derive(Debug)]
pub struct HugePages {
    before: String,
    _reserved: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Reserves enough for `size`. Needs root.
    ///
    /// # Errors
    ///
    /// The host has no such huge pages, or not that many.
    pub fn reserve(size: Size) -> Result<Self> {
        let reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        let page = Meminfo::current()?.hugepagesize;
        let page = Size::bytes(page.context("the host's kernel has no huge pages")?);
        ensure!(
            page == Size::mib(2),
            "the host's huge pages have {page}, not 2 MiB"
        );
        let this = Self {
            before: fs::read_to_string(NUMBER)?,
            _reserved: reserved,
        };
        let wanted = this.before.trim().parse::<u64>()? + size.as_mib() / 2;
        fs::write(NUMBER, wanted.to_string()).context("reserving huge pages")?;
        let free = this.free()?;
        ensure!(
            free >= size,
            "the host has {free} for huge pages, not {size}"
        );
        Ok(this)
    }

    /// How much of them is not in use.
    pub fn free(&self) -> Result<Size> {
        let pages = Meminfo::current()?.hugepages_free;
        let pages = pages.context("the host's kernel has no huge pages")?;
        Ok(Size::mib(pages * 2))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A failure only costs memory of the host.
        let _ = fs::write(NUMBER, &self.before);
    }
}

/// Whether the host gives transparent huge pages to a guest's anonymous memory. QEMU asks for them.
pub fn has_transparent_huge_pages() -> bool {
    fs::read_to_string(TRANSPARENT)
        .is_ok_and(|text| text.contains("[always]") || text.contains("[madvise]"))
}
