// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fault injection: fails the driver's allocations, one after the other. For debug kernels.

use std::fmt;

use anyhow::{Context, Result, bail};

use crate::guest::Guest;

/// The address range of modules on x86_64. The driver is the only module in a guest.
const MODULES: [&str; 2] = ["0xffffffffa0000000", "0xffffffffff000000"];

/// The depth of the stack trace in which the kernel looks for the driver: the kernel's maximum.
const DEPTH: &str = "32";

/// An upper limit for the allocations of one step.
const MOST: u64 = 5_000;

/// A kind of allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Less than a page.
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
    /// The kernel's name of the fault injection for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slab => "failslab",
            Self::Pages => "fail_page_alloc",
        })
    }
}

impl Guest {
    /// Repeats `prepare` and `step`. In the first run the first allocation of the step by the
    /// driver, or by a function that it calls, fails, in any process. In the second run the second
    /// one fails, and so on, until a run has no failed allocation. `check` gets the result of
    /// `step` each time. Returns how many allocations have failed.
    ///
    /// Call this once for each kind of allocation in a guest: the kernel's count of them cannot be
    /// reset.
    ///
    /// # Errors
    ///
    /// The errors of `prepare` and `check`, with the number of the allocation.
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
            // Fails one allocation, when the count is a multiple of this.
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
