// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's memory: the pool, its reserve, and how much the host waits for memory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use balloon_policy::{GIB, HostPressure, Millis, Pages};

use crate::config::{Config, PAGE};

/// The part of the time, in thousandths, in which some of the host's processes, or all, wait for memory.
const SOME: u64 = 150;
const FULL: u64 = 100;

/// The state of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) pool: Pages,
    pub(crate) reserve: Pages,
    pub(crate) pressure: HostPressure,
}

/// What a measured pool has beyond what the VMs have, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Negative if the host lacks memory.
    rest: i64,
    /// All of the pool is no more than this.
    most: Pages,
}

impl Room {
    /// The smaller room of two times.
    pub(crate) fn least(self, other: Self) -> Self {
        Self {
            rest: self.rest.min(other.rest),
            most: self.most.min(other.most),
        }
    }

    /// The pool of VMs that have so much.
    fn pool(self, resident: Pages) -> Pages {
        resident.saturating_add_signed(self.rest).min(self.most)
    }
}

/// The difference of two numbers of pages.
fn difference(one: Pages, other: Pages) -> i64 {
    let distance = i64::try_from(one.abs_diff(other)).unwrap_or(i64::MAX);
    if one < other { -distance } else { distance }
}

/// Reads the host's files below a directory.
#[derive(Debug)]
pub(crate) struct Host {
    proc: PathBuf,
    /// The time of the last reading of the pressure, and the waiting times until then, in
    /// microseconds.
    last: Option<(Millis, [u64; 2])>,
    pressure: HostPressure,
}

impl Host {
    pub(crate) fn new(proc: &Path) -> Self {
        Self {
            proc: proc.to_owned(),
            last: None,
            pressure: HostPressure::None,
        }
    }

    /// Measures the room of the pool, unless the configuration sets the pool. The resident memory of VMs must be from the
    /// same time: what a VM gives back, or takes, changes both.
    pub(crate) fn room(&self, config: &Config) -> Result<Option<Room>> {
        match (&config.host.pool, &config.host.cgroup) {
            (Some(_), _) => Ok(None),
            (None, Some(cgroup)) => self.cgroup_room(cgroup).map(Some),
            (None, None) => self.host_room().map(Some),
        }
    }

    /// `resident` is what the VMs have of the host's memory.
    pub(crate) fn read(
        &mut self,
        config: &Config,
        now: Millis,
        room: Option<Room>,
        resident: Pages,
    ) -> Reading {
        let fixed = config.host.pool.map_or(0, |pool| pool.of(0));
        let pool = room.map_or(fixed, |room| room.pool(resident));
        let reserve = match config.host.reserve {
            Some(reserve) => reserve.of(pool),
            None => usual_reserve(pool),
        };
        Reading {
            pool,
            reserve,
            pressure: self.pressure(now),
        }
    }

    /// Available memory, less the VMs' memory in swap, which the host lacks.
    fn host_room(&self) -> Result<Room> {
        let [available, total, free] =
            self.meminfo(["MemAvailable:", "SwapTotal:", "SwapFree:"])?;
        Ok(Room {
            rest: difference(available, total.saturating_sub(free)),
            most: Pages::MAX,
        })
    }

    /// Fields of the host's meminfo.
    fn meminfo<const N: usize>(&self, names: [&str; N]) -> Result<[Pages; N]> {
        let path = self.proc.join("meminfo");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut pages = [0; N];
        for (pages, name) in pages.iter_mut().zip(names) {
            let kib = field(&text, name);
            let kib = kib.with_context(|| format!("{} has no {name}", path.display()))?;
            *pages = kib * 1024 / PAGE;
        }
        Ok(pages)
    }

    /// The limit of a cgroup, of version 1 or 2, less the memory of its processes. The kernel takes page cache back when
    /// the group needs the memory. Memory in swap counts, since the resident memory of VMs has it in it.
    fn cgroup_room(&self, cgroup: &Path) -> Result<Room> {
        let [host] = self.meminfo(["MemTotal:"])?;
        let read = |name: &str| fs::read_to_string(cgroup.join(name));
        for (limit, usage, prefix) in [
            ("memory.max", "memory.current", ""),
            (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                // With the groups in it, as in the usage.
                "total_",
            ),
        ] {
            let Ok(limit) = read(limit) else {
                continue;
            };
            // Without a limit version 2 has "max", and version 1 a huge number.
            let limit = limit
                .trim()
                .parse()
                .map_or(Pages::MAX, |bytes: u64| bytes / PAGE);
            if limit >= host {
                bail!(
                    "the cgroup {} has no limit below the host's memory: set one, or host.pool",
                    cgroup.display()
                );
            }
            let statistics = read("memory.stat")?;
            let value = |name: &str| field(&statistics, &format!("{prefix}{name}")).unwrap_or(0);
            let cache = value("inactive_file") + value("active_file");
            // Of version 2, and of version 1.
            let swapped = read("memory.swap.current").unwrap_or_default();
            let swapped = swapped.trim().parse().unwrap_or(value("swap"));
            let used = read(usage)?.trim().parse::<u64>()? + swapped;
            return Ok(Room {
                rest: difference(limit, used.saturating_sub(cache) / PAGE),
                most: limit,
            });
        }
        bail!(
            "{} is no memory cgroup: set host.cgroup to one",
            cgroup.display()
        );
    }

    /// How much the host has waited since the last reading. Without this statistic in the kernel it
    /// is 0.
    fn pressure(&mut self, now: Millis) -> HostPressure {
        let Ok(text) = fs::read_to_string(self.proc.join("pressure/memory")) else {
            return HostPressure::None;
        };
        let total = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split("total=").nth(1)?.trim().parse::<u64>().ok()
        };
        let totals = [total("some"), total("full")].map(Option::unwrap_or_default);
        let Some((then, old)) = self.last else {
            self.last = Some((now, totals));
            return self.pressure;
        };
        let time = now.saturating_sub(then);
        if time < 1_000 {
            return self.pressure;
        }
        // Microseconds in milliseconds are thousandths.
        let [some, full] =
            [0, 1].map(|index: usize| totals[index].saturating_sub(old[index]) / time);
        self.last = Some((now, totals));
        self.pressure = match (some >= SOME, full >= FULL) {
            (_, true) => HostPressure::Full,
            (true, false) => HostPressure::Some,
            (false, false) => HostPressure::None,
        };
        self.pressure
    }
}

/// Measures the room of the pool for the tasks of VMs.
#[derive(Debug)]
pub(crate) struct Meter {
    host: Host,
    config: Config,
}

impl Meter {
    pub(crate) fn new(proc: &Path, config: Config) -> Self {
        let host = Host::new(proc);
        Self { host, config }
    }

    /// The room now, unless the configuration sets the pool. The manager reports errors.
    pub(crate) fn room(&self) -> Option<Room> {
        self.host.room(&self.config).ok().flatten()
    }
}

/// The number that follows a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines
        .find_map(|mut words| words.next().filter(|&word| word == name).and(words.next()))?
        .parse()
        .ok()
}

/// 6 % of the first 4 GiB, 4 % of the next 8, 2 % of the next 16, and 1 % of the rest.
fn usual_reserve(pool: Pages) -> Pages {
    let mut rest = pool;
    let mut reserve = 0;
    for (size, percent) in [(4 * GIB, 6), (8 * GIB, 4), (16 * GIB, 2), (Pages::MAX, 1)] {
        let part = rest.min(size);
        reserve += part / 100 * percent;
        rest -= part;
    }
    reserve
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, name: &str, text: &str) {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_pool_is_measured() {
        let proc = tempfile::tempdir().unwrap();
        let meminfo =
            "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nSwapTotal: 800 kB\nSwapFree: 400 kB\n";
        write(proc.path(), "meminfo", meminfo);
        let mut host = Host::new(proc.path());
        let room = host.room(&Config::default()).unwrap();
        let reading = host.read(&Config::default(), 0, room, 250);
        assert_eq!(reading.pool, 1_000 + 250 - 100);
        let set = config("[host]\npool = '1GiB'\nreserve = '10%'");
        assert_eq!(host.room(&set).unwrap(), None);
        let reading = host.read(&set, 0, None, 250);
        assert_eq!(
            (reading.pool, reading.reserve),
            (GIB, GIB / 100 * 10 + GIB % 100 / 10)
        );
    }

    /// A host of 100,000 pages.
    fn host() -> (tempfile::TempDir, Host) {
        let proc = tempfile::tempdir().unwrap();
        write(proc.path(), "meminfo", "MemTotal: 400000 kB\n");
        let host = Host::new(proc.path());
        (proc, host)
    }

    #[test]
    fn cgroups_of_both_versions_are_read() {
        let (_proc, host) = host();
        let directory = tempfile::tempdir().unwrap();
        let group = directory.path();
        let pool = || host.cgroup_room(group).map(|room| room.pool(400));
        assert!(pool().is_err());
        write(group, "memory.limit_in_bytes", "40960000\n");
        write(group, "memory.usage_in_bytes", "4096000\n");
        write(
            group,
            "memory.stat",
            "inactive_file 0\ntotal_inactive_file 0\n",
        );
        assert_eq!(pool().unwrap(), 10_000 - 600);
        write(group, "memory.max", "8192000\n");
        write(group, "memory.current", "4096\n");
        assert_eq!(pool().unwrap(), 2_000);
    }

    #[test]
    fn page_cache_of_a_cgroup_is_not_used_and_swapped_memory_is() {
        let (_proc, host) = host();
        let directory = tempfile::tempdir().unwrap();
        let group = directory.path();
        let pool = || host.cgroup_room(group).unwrap().pool(1_000);
        // VMs have 1,000 pages, of which 100 are in swap. Others have 200. Page cache fills the group.
        write(group, "memory.limit_in_bytes", "40960000\n");
        write(group, "memory.usage_in_bytes", "40960000\n");
        let children = "cache 0\nswap 0\ninactive_file 0\nactive_file 0\ntotal_swap 409600\n\
                        total_inactive_file 32768000\ntotal_active_file 3686400\n";
        write(group, "memory.stat", children);
        assert_eq!(pool(), 10_000 - 200);
        write(group, "memory.max", "40960000\n");
        write(group, "memory.current", "40960000\n");
        write(group, "memory.swap.current", "409600\n");
        write(
            group,
            "memory.stat",
            "file 99\ninactive_file 32768000\nactive_file 3686400\n",
        );
        assert_eq!(pool(), 10_000 - 200);
    }

    #[test]
    fn a_cgroup_without_a_limit_is_no_pool() {
        let (_proc, host) = host();
        let directory = tempfile::tempdir().unwrap();
        let group = directory.path();
        write(group, "memory.stat", "");
        let is_refused = || {
            let error = host.cgroup_room(group).map_err(|error| error.to_string());
            error.is_err_and(|error| error.contains("has no limit"))
        };
        for (limit, usage, none) in [
            (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "9223372036854771712\n",
            ),
            ("memory.max", "memory.current", "max\n"),
        ] {
            write(group, usage, "4096\n");
            write(group, limit, "40960000\n");
            assert!(!is_refused());
            write(group, limit, none);
            assert!(is_refused());
            write(group, limit, "409600000\n");
            assert!(is_refused());
        }
    }

    #[test]
    fn waiting_is_pressure() {
        let proc = tempfile::tempdir().unwrap();
        let mut host = Host::new(proc.path());
        assert_eq!(host.pressure(0), HostPressure::None);
        let mut waited = |some: u64, full: u64, now| {
            let text = format!("some avg10=0.00 total={some}\nfull avg10=0.00 total={full}\n");
            write(proc.path(), "pressure/memory", &text);
            host.pressure(now)
        };
        assert_eq!(waited(5_000_000, 0, 0), HostPressure::None);
        assert_eq!(waited(5_100_000, 0, 1_000), HostPressure::None);
        assert_eq!(waited(5_300_000, 0, 2_000), HostPressure::Some);
        assert_eq!(waited(9_000_000, 0, 2_500), HostPressure::Some);
        assert_eq!(waited(9_000_000, 300_000, 4_000), HostPressure::Full);
        assert_eq!(waited(9_000_000, 300_000, 5_000), HostPressure::None);
    }

    #[test]
    fn the_reserve_grows_slowly() {
        assert_eq!(usual_reserve(4 * GIB), 4 * GIB / 100 * 6);
        // About 900 MiB.
        assert_eq!(usual_reserve(28 * GIB) / 256, 901);
    }
}
