// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a guest, as its kernel counts it.

use anyhow::{Context, Result};

use super::Guest;
use crate::size::Size;

/// The guest's own view of its memory, from /proc/meminfo.
#[derive(Clone, Copy, Debug)]
pub struct Meminfo {
    /// All memory that the kernel manages.
    pub total: Size,
    /// Free memory, without the per-CPU page lists.
    pub free: Size,
    /// Memory that is available without swapping.
    pub available: Size,
    /// Memory in balloons.
    pub balloon: Size,
}

impl Guest {
    /// The guest's own view of its memory.
    pub fn meminfo(&self) -> Result<Meminfo> {
        self.fold_counters()?;
        let text = self.read_file("/proc/meminfo")?;
        let field = |name: &str| -> Result<Size> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.split_whitespace().next());
            Ok(Size::kib(
                kib.with_context(|| format!("/proc/meminfo has no {name}"))?
                    .parse()?,
            ))
        };
        Ok(Meminfo {
            total: field("MemTotal")?,
            free: field("MemFree")?,
            available: field("MemAvailable")?,
            balloon: field("Balloon")?,
        })
    }

    /// Free memory, including the per-CPU page lists, which `MemFree` leaves out. Reads both from
    /// one file, since the kernel may drain the lists at any moment.
    pub fn free(&self) -> Result<Size> {
        self.fold_counters()?;
        let zones = self.read_file("/proc/zoneinfo")?;
        zones
            .lines()
            .filter_map(|line| {
                let line = line.trim_start();
                line.strip_prefix("pages free")
                    .or_else(|| line.strip_prefix("count:"))
            })
            .map(|pages| Ok(self.page_size() * pages.trim().parse()?))
            .sum()
    }

    /// A counter of /proc/vmstat, such as `nr_balloon_pages`.
    pub fn vmstat(&self, name: &str) -> Result<u64> {
        self.fold_counters()?;
        let text = self.read_file("/proc/vmstat")?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line
            .with_context(|| format!("/proc/vmstat has no {name}"))?
            .parse()?)
    }

    /// How much of a NUMA node's memory is in balloons.
    pub fn node_balloon(&self, node: u32) -> Result<Size> {
        self.node_vmstat(node, "nr_balloon_pages")
    }

    /// How much of a NUMA node's memory is free.
    pub fn node_free(&self, node: u32) -> Result<Size> {
        self.node_vmstat(node, "nr_free_pages")
    }

    /// A counter in pages of a NUMA node, as an amount of memory.
    fn node_vmstat(&self, node: u32, name: &str) -> Result<Size> {
        self.fold_counters()?;
        let text = self.read_file(&format!("/sys/devices/system/node/node{node}/vmstat"))?;
        let pages = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .with_context(|| format!("a node does not count {name}"))?;
        Ok(self.page_size() * pages.parse()?)
    }

    /// Makes each processor add its own counts to the sums, so that these are exact.
    fn fold_counters(&self) -> Result<()> {
        self.write_file("/proc/sys/vm/stat_refresh", "1")
    }
}
