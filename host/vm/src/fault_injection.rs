// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Allocations of the driver that fail, one after the other. For debug kernels.

use std::fmt;

use anyhow::{Context, Result, bail};

use crate::guest::Guest;

/// Where modules are on x86_64. The driver is the only one that a guest has loaded.
const MODULES: [&str; 2] = ["0xffffffffa0000000", "0xffffffffff000000"];

/// How many callers are looked at to find out who allocates: as many as the kernel can look at.
const DEPTH: &str = "32";

/// More allocations than there should be in one step.
const MOST: u64 = 5_000;

/// What can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// What is smaller than a page.
    Slab,
    /// Pages.
    Pages,
}

impl Allocation {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Slab, Self::Pages];

    fn set(self, guest: &Guest, file: &str, value: &str) -> Result<()> {
        guest.write_file(&format!("/sys/kernel/debug/{self}/{file}"), value)
    }
}

impl fmt::Display for Allocation {
    /// The kernel's name of the facility that has it fail.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slab => "failslab",
            Self::Pages => "fail_page_alloc",
        })
    }
}

impl Guest {
    /// Does `prepare` and `step` over and over. The first time the first allocation of the step
    /// fails that is made in the driver or by what it calls, whichever process that is in, then the
    /// second one, and so on, until there is none left to fail. `check` looks each time at what has
    /// become of it, and is given what `step` has returned. Returns how many allocations have
    /// failed.
    ///
    /// To be called once for each kind of allocation in a guest: the kernel's count of them cannot
    /// be set back.
    ///
    /// # Errors
    ///
    /// What `prepare` and `check` return, with the number of the allocation.
    pub fn fail_each_allocation<T>(
        &self,
        kind: Allocation,
        mut prepare: impl FnMut() -> Result<()>,
        mut step: impl FnMut() -> T,
        mut check: impl FnMut(T) -> Result<()>,
    ) -> Result<u64> {
        let set = |file: &str, value: &str| kind.set(self, file, value);
        for (file, value) in [
            ("require-start", MODULES[0]),
            ("require-end", MODULES[1]),
            ("stacktrace-depth", DEPTH),
            ("ignore-gfp-wait", "N"),
            ("verbose", "0"),
            ("probability", "100"),
        ] {
            set(file, value)?;
        }
        if kind == Allocation::Pages {
            set("ignore-gfp-highmem", "N")?;
            set("min-order", "0")?;
        }

        let mut counted = 0;
        for number in 1..MOST {
            self.write_file("/dev/kmsg", &format!("{kind}: allocation {number}\n"))?;
            prepare().with_context(|| format!("{kind}: before allocation {number}"))?;
            // Fails what makes the count a multiple of it, once.
            set("interval", &(counted + number).to_string())?;
            set("times", "1")?;
            let outcome = step();
            let left = self.read_file(&format!("/sys/kernel/debug/{kind}/times"))?;
            set("times", "0")?;
            check(outcome).with_context(|| format!("{kind}: allocation {number}"))?;
            if left.trim() != "0" {
                return Ok(number - 1);
            }
            // At an interval of one the kernel does not count.
            if counted + number > 1 {
                counted += number;
            }
        }
        bail!("{kind}: there is no end of allocations");
    }
}
