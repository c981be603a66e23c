// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Returning memory to the host.
//!
//! The guest's memory is in files that the front end has sent. The device returns memory by punching a
//! hole into the file. It never maps the file. The front end and the guest see zeroes in the hole, and a
//! write to the hole allocates memory again.
//!
//! The smallest hole of a file is its granule: a huge page of hugetlbfs, a huge page of shared memory if
//! the host uses those, or the host's page. A hole in a part of a granule would return nothing (hugetlbfs)
//! or split a huge page, so the device punches only whole granules.
//!
//! The pages of a granule may be in several messages. After the device has used a message, it may change its
//! pages only if the driver notifies the device before it reuses a page (VIRTIO_BALLOON_F_MUST_TELL_HOST, or
//! page sets without VIRTIO_BALLOON_F_DEFLATE_ON_OOM). Other drivers may already use the page. So only with a
//! driver that notifies, a granule may wait for its last page. With others, all of its pages must be in one
//! batch. The device offers VIRTIO_BALLOON_F_MUST_TELL_HOST where it expects large granules.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use balloon_wire::BALLOON_PAGE_SIZE;
use log::error;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{SysconfVar, sysconf};
use procfs::process::{MountInfo, Process};

use crate::budget::Budget;
use crate::counters::Counters;

/// The host's settings for transparent huge pages.
const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";
/// The name of those for shared memory: in the directory itself, and in that of each size.
const SHMEM: &str = "shmem_enabled";

/// The size of one call, which takes a small part of a queue's time.
const PART: u64 = 32 << 20;

/// The daemon logs an error at most once in this interval.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The size of a transparent huge page in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// The granule of shared memory. That of hugetlbfs is always the file's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Granularity {
    /// The largest huge page if the host uses huge pages for this shared memory, otherwise the host's page.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl FromStr for Granularity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "4K" => Ok(Self::Bytes(BALLOON_PAGE_SIZE)),
            "2M" => Ok(Self::Bytes(HUGE_PAGE)),
            _ => Err("use auto, 4K or 2M".to_owned()),
        }
    }
}

impl Granularity {
    /// The granule of memory in `file` in bytes: a power of two, and a whole number of balloon pages.
    pub fn of(self, file: &File) -> u64 {
        let page = sysconf(SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|bytes| u64::try_from(bytes).ok())
            .unwrap_or(BALLOON_PAGE_SIZE);
        let granule = match (fstatfs(file), self) {
            (Ok(stat), _) if stat.filesystem_type() == HUGETLBFS_MAGIC => {
                u64::try_from(stat.block_size()).unwrap_or(HUGE_PAGE)
            }
            (_, Self::Bytes(bytes)) => bytes,
            (Ok(stat), Self::Auto) if stat.filesystem_type() == TMPFS_MAGIC => {
                huge_page_of(file).unwrap_or(page)
            }
            _ => page,
        };
        granule
            .checked_next_power_of_two()
            .unwrap_or(HUGE_PAGE)
            .max(page)
            .max(BALLOON_PAGE_SIZE)
    }
}

impl Granularity {
    /// Whether granules are larger than a page, as far as that is known without memory.
    pub fn is_large(self) -> bool {
        match self {
            Self::Auto => {
                let setting = shmem_setting();
                huge_page_of_memfd(&setting).is_some()
                    || (!is_for_mounts(&setting) && mounts().any(|mount| is_huge_mount(&mount)))
            }
            Self::Bytes(bytes) => bytes > BALLOON_PAGE_SIZE,
        }
    }
}

/// The host's setting for huge pages of shared memory. A mounted tmpfs has a setting of its own.
fn shmem_setting() -> String {
    fs::read_to_string(Path::new(SETTINGS).join(SHMEM)).unwrap_or_default()
}

/// The host's settings for huge pages of each size in bytes. Kernels before 6.11 have none.
fn settings_by_size() -> Vec<(u64, String)> {
    let size = |name: &str| {
        let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
        kib.parse::<u64>().ok()?.checked_mul(1 << 10)
    };
    fs::read_dir(SETTINGS)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let setting = fs::read_to_string(entry.path().join(SHMEM)).ok()?;
            Some((size(entry.file_name().to_str()?)?, setting))
        })
        .collect()
}

/// Whether the host's setting is for mounted file systems, too.
fn is_for_mounts(setting: &str) -> bool {
    ["[force]", "[deny]"]
        .iter()
        .any(|value| setting.contains(value))
}

/// The largest huge page that a file in shared memory may have, in bytes.
fn huge_page_of(file: &File) -> Option<u64> {
    let setting = shmem_setting();
    match mount_of(file).filter(|_| !is_for_mounts(&setting)) {
        Some(mount) => is_huge_mount(&mount).then_some(HUGE_PAGE),
        // A memfd is in no mount.
        None => huge_page_of_memfd(&setting),
    }
}

/// The same for a memfd, if this is the host's setting.
fn huge_page_of_memfd(setting: &str) -> Option<u64> {
    largest(setting, &settings_by_size())
}

/// The largest huge page that a memfd may have with the host's setting and those for each size. Larger ones than 2 MiB
/// count as 2 MiB: a balloon hardly ever has all of one.
fn largest(setting: &str, by_size: &[(u64, String)]) -> Option<u64> {
    if by_size.is_empty() {
        return is_huge(setting).then_some(HUGE_PAGE);
    }
    let is_inherited = |of_size: &str| is_huge(setting) && of_size.contains("[inherit]");
    // With `deny` and `force` the settings for each size do not count.
    let is_used =
        |of_size: &str| is_inherited(of_size) || (!is_for_mounts(setting) && is_huge(of_size));
    by_size
        .iter()
        .filter(|(_, of_size)| is_used(of_size))
        .map(|&(size, _)| size.min(HUGE_PAGE))
        .max()
}

/// The mount that a file is in, if this process sees it.
fn mount_of(file: &File) -> Option<MountInfo> {
    let device = file.metadata().ok()?.dev();
    let numbers = format!("{}:{}", major(device), minor(device));
    mounts().find(|mount| mount.majmin == numbers)
}

fn mounts() -> impl Iterator<Item = MountInfo> {
    let mounts = Process::myself().and_then(|this| this.mountinfo());
    mounts.into_iter().flatten()
}

/// Whether it is a tmpfs with huge pages. The option is missing with `huge=never`.
fn is_huge_mount(mount: &MountInfo) -> bool {
    mount.fs_type == "tmpfs" && mount.super_options.contains_key("huge")
}

/// Whether the host's setting is for huge pages. QEMU asks for them with madvise(), so `advise` counts.
fn is_huge(setting: &str) -> bool {
    ["[always]", "[within_size]", "[advise]", "[force]"]
        .iter()
        .any(|value| setting.contains(value))
}

/// A piece of the guest's memory: a range of bytes of a file.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The file.
    pub file: Arc<File>,
    /// The range in bytes.
    pub range: Range<u64>,
    /// The granule of the file in bytes.
    pub granule: u64,
}

impl Piece {
    /// Its parts, each of a bounded size, and of whole granules if it has such.
    fn parts(&self) -> impl Iterator<Item = Self> {
        let step = PART.max(self.granule);
        let mut start = self.range.start;
        std::iter::from_fn(move || {
            let end = (start / step + 1).saturating_mul(step).min(self.range.end);
            let range = start..end;
            start = end;
            (!range.is_empty()).then(|| Self {
                file: Arc::clone(&self.file),
                range,
                granule: self.granule,
            })
        })
    }

    /// How long it is, in bytes.
    fn length(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

/// Pieces. A piece that continues the previous one is merged with it.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: Vec<Piece>,
    /// How many bytes were left out, since they must not be discarded.
    withheld: u64,
}

impl Pieces {
    /// Adds a range of bytes of a file that has this granule.
    pub fn push(&mut self, file: &Arc<File>, range: Range<u64>, granule: u64) {
        match self.pieces.last_mut() {
            Some(last) if last.range.end == range.start && Arc::ptr_eq(&last.file, file) => {
                last.range.end = range.end;
            }
            _ => self.pieces.push(Piece {
                file: Arc::clone(file),
                range,
                granule,
            }),
        }
    }

    /// Leaves so many bytes out at the beginning.
    fn skip(&mut self, mut bytes: u64) {
        self.pieces.retain_mut(|piece| {
            let skipped = bytes.min(piece.length());
            piece.range.start += skipped;
            bytes -= skipped;
            piece.length() > 0
        });
    }

    /// Counts so many bytes that must not be discarded.
    pub fn withhold(&mut self, bytes: u64) {
        self.withheld = self.withheld.saturating_add(bytes);
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.withheld = 0;
    }
}

/// Returns memory to the host, and allocates it again.
#[derive(Debug, Default)]
pub struct Discarder {
    /// Whether no memory may be returned now.
    pub withhold: bool,
    /// When each error was logged: an error usually repeats for every piece.
    logged: Vec<(Errno, Instant)>,
}

impl Discarder {
    /// Punches a hole for each of the pieces, and empties them. The first `done` bytes of them were handled
    /// before, and the handled bytes are added. Returns whether there was time for all.
    pub fn discard(
        &mut self,
        pieces: &mut Pieces,
        counters: &Counters,
        done: &mut u64,
        budget: Budget,
    ) -> bool {
        if *done == 0 {
            counters.withheld.add(pieces.withheld);
        }
        pieces.skip(*done);
        let mut in_time = true;
        let mut parts = pieces.pieces.iter().flat_map(Piece::parts).peekable();
        while let (Some(part), true) = (parts.next(), in_time) {
            self.punch(&part, counters);
            *done = done.saturating_add(part.length());
            in_time = parts.peek().is_none() || !budget.is_over();
        }
        drop(parts);
        pieces.clear();
        in_time
    }

    fn punch(&mut self, piece: &Piece, counters: &Counters) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if self.withhold {
            counters.withheld.add(piece.length());
            return;
        }
        match counters.discarding.time(|| allocate(piece, flags)) {
            Ok(()) => {
                counters.discards.add(1);
                counters.discarded.add(piece.length());
            }
            Err(errno) => {
                counters.discard_failures.add(1);
                if self.is_due(errno) {
                    let advice = match errno {
                        Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EBADF => {
                            "have the VMM use a memory file that is open for writing and can have holes, as \
                             QEMU's memory-backend-memfd with share=on is"
                        }
                        _ => "fallocate(2) says what this means for FALLOC_FL_PUNCH_HOLE",
                    };
                    error!("cannot return memory to the host: {errno}; {advice}");
                }
            }
        }
    }

    /// Allocates memory for those of the pieces that need it, or for `all`, and empties them. Returns false if
    /// the host lacks memory now. It returns true if the file's memory can never be allocated, since a wait
    /// would be useless.
    pub fn prefault(&mut self, pieces: &mut Pieces, all: bool, counters: &Counters) -> bool {
        let mut ready = true;
        for piece in &pieces.pieces {
            if !all && !may_run_out(&piece.file) {
                continue;
            }
            let Err(errno) = allocate(piece, FallocateFlags::empty()) else {
                continue;
            };
            counters.prefault_failures.add(1);
            let short = matches!(errno, Errno::ENOMEM | Errno::ENOSPC | Errno::EDQUOT);
            ready &= !short;
            if self.is_due(errno) {
                if short {
                    error!(
                        "the host has no memory for what the guest takes back: {errno}; free memory on the host, \
                         or huge pages, or room in the tmpfs, before the guest needs it"
                    );
                } else {
                    error!(
                        "cannot allocate memory in the guest's memory file: {errno}; have the VMM use a memory \
                         file that is open for writing, as QEMU's memory-backend-memfd is, or leave out --prefault"
                    );
                }
            }
        }
        pieces.clear();
        ready
    }

    /// Whether an error was not logged for a while.
    fn is_due(&mut self, errno: Errno) -> bool {
        let now = Instant::now();
        match self.logged.iter_mut().find(|(logged, _)| *logged == errno) {
            Some((_, at)) if now.duration_since(*at) < LOG_INTERVAL => return false,
            Some((_, at)) => *at = now,
            None => self.logged.push((errno, now)),
        }
        true
    }
}

/// Whether the file may lack memory although the host has some: huge pages may be used up, or a tmpfs may be
/// full.
fn may_run_out(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else {
        return true;
    };
    match fstatfs(file) {
        Ok(stat) if stat.filesystem_type() == HUGETLBFS_MAGIC => true,
        // A memfd's tmpfs has no limit, and reports no blocks.
        Ok(stat) if stat.filesystem_type() == TMPFS_MAGIC && stat.blocks() > 0 => {
            let block = u64::try_from(stat.block_size()).unwrap_or_default();
            let room = stat.blocks_available().saturating_mul(block);
            room < metadata
                .len()
                .saturating_sub(metadata.blocks().saturating_mul(512))
        }
        _ => false,
    }
}

fn allocate(piece: &Piece, flags: FallocateFlags) -> Result<(), Errno> {
    let offset = i64::try_from(piece.range.start).map_err(|_| Errno::EFBIG)?;
    let length = i64::try_from(piece.length()).map_err(|_| Errno::EFBIG)?;
    loop {
        match fallocate(&piece.file, flags, offset, length) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{huge_file, memory_file};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    fn discard(pieces: &mut Pieces, counters: &Counters) {
        assert!(Discarder::default().discard(pieces, counters, &mut 0, Budget::UNLIMITED));
    }

    #[test]
    fn a_long_piece_takes_several_turns() {
        let file = memory_file(3 * PART);
        let counters = Counters::default();
        let mut discarder = Discarder::default();
        let mut done = 0;
        let mut turns = 0;
        loop {
            let mut pieces = Pieces::default();
            pieces.push(&file, 4096..PART, 4096);
            pieces.push(&file, PART + 4096..3 * PART, 4096);
            pieces.withhold(5);
            turns += 1;
            if discarder.discard(&mut pieces, &counters, &mut done, Budget::spent()) {
                break;
            }
        }
        assert_eq!((turns, counters.discards.get()), (3, 3));
        assert_eq!(counters.discarded.get(), 3 * PART - 8192);
        assert_eq!(counters.withheld.get(), 5);
    }

    #[test]
    fn memory_that_is_not_there_is_counted() {
        // A read-only file cannot allocate memory.
        let file = memory_file(4096);
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let mut pieces = Pieces::default();
        pieces.push(&Arc::new(read_only), 0..4096, 4096);
        let counters = Counters::default();
        let mut discarder = Discarder::default();
        assert!(
            discarder.prefault(&mut pieces, false, &counters),
            "a memfd needs none"
        );
        pieces.push(&file, 0..4096, 4096);
        assert!(discarder.prefault(&mut pieces, true, &counters));
        let (huge, granule) = huge_file();
        pieces.push(&huge, 0..4096, granule);
        assert!(!discarder.prefault(&mut pieces, false, &counters));
        assert_eq!(counters.prefault_failures.get(), 1);
        assert!(!discarder.is_due(Errno::ENOSPC), "it was logged");
    }

    #[test]
    fn only_a_shortage_is_worth_waiting_for() {
        // A read-only file cannot allocate memory.
        let file = memory_file(4096);
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let mut pieces = Pieces::default();
        pieces.push(&Arc::new(read_only), 0..4096, 4096);
        let counters = Counters::default();
        let mut discarder = Discarder::default();
        assert!(discarder.prefault(&mut pieces, true, &counters));
        assert_eq!(counters.prefault_failures.get(), 1);
        assert!(!discarder.is_due(Errno::EBADF), "it was logged");
    }

    #[test]
    fn neighbours_become_one_hole() {
        let file = memory_file(64 << 10);
        file.write_all_at(&[1; 64 << 10], 0).unwrap();
        let blocks = file.metadata().unwrap().blocks();

        let mut pieces = Pieces::default();
        for page in [1, 2, 3, 8] {
            pieces.push(&file, page * 4096..(page + 1) * 4096, 4096);
        }
        let counters = Counters::default();
        discard(&mut pieces, &counters);
        assert_eq!(counters.discards.get(), 2);
        assert_eq!(counters.discarded.get(), 4 * 4096);
        assert_eq!(file.metadata().unwrap().blocks(), blocks - 4 * 8);

        let mut bytes = vec![0; 64 << 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (page, bytes) in bytes.chunks(4096).enumerate() {
            let expected = u8::from(![1, 2, 3, 8].contains(&page));
            assert!(bytes.iter().all(|&byte| byte == expected), "page {page}");
        }

        pieces.push(&file, 4096..8192, 4096);
        assert!(Discarder::default().prefault(&mut pieces, true, &counters));
        assert_eq!(file.metadata().unwrap().blocks(), blocks - 3 * 8);
    }

    #[test]
    fn a_file_without_holes_is_counted() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let mut pieces = Pieces::default();
        pieces.push(&file, 0..4096, 4096);
        let counters = Counters::default();
        discard(&mut pieces, &counters);
        assert_eq!(counters.discard_failures.get(), 1);
        assert_eq!(counters.discarded.get(), 0);
    }

    #[test]
    fn the_granule_is_what_was_asked_for() {
        let file = memory_file(4096);
        assert_eq!(Granularity::Bytes(HUGE_PAGE).of(&file), HUGE_PAGE);
        assert_eq!(Granularity::Bytes(1).of(&file), 4096);
        // Huge pages of hugetlbfs have no parts.
        let (huge, size) = huge_file();
        for asked in [Granularity::Auto, Granularity::Bytes(4096)] {
            assert_eq!(asked.of(&huge), size);
        }
        assert_eq!("2M".parse(), Ok(Granularity::Bytes(HUGE_PAGE)));
        assert!("3M".parse::<Granularity>().is_err());
    }

    #[test]
    fn huge_pages_are_found() {
        assert!(is_huge("always within_size [advise] never deny force"));
        assert!(!is_huge("always within_size advise [never] deny force"));
    }

    #[test]
    fn each_size_of_huge_pages_has_a_setting_of_its_own() {
        let largest = |setting: &str, by_size: &[(u64, &str)]| {
            let by_size: Vec<_> = by_size
                .iter()
                .map(|&(kib, of_size)| (kib << 10, format!("always {of_size} advise")))
                .collect();
            super::largest(&format!("always [{setting}] other"), &by_size)
        };
        // Older kernels.
        assert_eq!(largest("advise", &[]), Some(HUGE_PAGE));
        assert_eq!(largest("never", &[]), None);
        // The kernel's defaults.
        let defaults = [(64, "[never]"), (2048, "[inherit]")];
        assert_eq!(largest("never", &defaults), None);
        for setting in ["always", "within_size", "advise", "force"] {
            assert_eq!(largest(setting, &defaults), Some(HUGE_PAGE), "{setting}");
        }
        // A size overrides the host's setting, in both directions.
        let small = [(2048, "[never]"), (64, "[advise]"), (32, "[always]")];
        for setting in ["always", "never"] {
            assert_eq!(largest(setting, &small), Some(64 << 10), "{setting}");
        }
        assert_eq!(
            largest("never", &[(2048, "[within_size]")]),
            Some(HUGE_PAGE)
        );
        for setting in ["deny", "force"] {
            assert_eq!(largest(setting, &small), None, "{setting}");
        }
        // 64-bit Arm with pages of 64 KiB.
        let largest_page = largest("always", &[(2048, "[never]"), (512 << 10, "[inherit]")]);
        assert_eq!(largest_page, Some(HUGE_PAGE));
    }
}
