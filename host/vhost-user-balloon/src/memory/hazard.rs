// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that must not be discarded.
//!
//! A hole in the guest's memory does harm if a device or a program relies on the discarded page:
//!
//! - A device that has pinned pages (VFIO, iommufd, vDPA, RDMA, an io_uring with fixed buffers) keeps the old
//!   page, and the guest gets a new one. They see different data from then on.
//! - With userfaultfd a handler may fill the hole with old content, of a snapshot.
//! - Memory that the VMM has locked must always be resident.
//! - A huge page of hugetlbfs returns to the pool, and its reservation ends. If the pool is empty when the
//!   guest uses the page again, the VM ends with SIGBUS.
//! - A hole in a file on a disk changes the file system, which is slow, and cannot be undone when the disk
//!   is full.
//!
//! QEMU's own balloon asks QEMU; vhost-user has no message for that. So the daemon reads /proc of the VMM, and of
//! other processes that use the guest's memory: a device in another process is in neither of the VMM's own lists. A
//! VMM whose state cannot be read is a hazard, too. For hazards of other processes that the daemon cannot see, clients
//! send `inhibit` (docs/control.md).

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use log::{info, warn};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use procfs::ProcResult;
use procfs::process::{FDTarget, Process, all_processes};

use super::pinning::is_pinning;

/// The maximum age of the VMM's state when memory is discarded. Reading it takes far less time.
const VMM_INTERVAL: Duration = Duration::from_millis(100);

/// The maximum age of the state of other processes. Reading all of them takes some milliseconds.
const OTHERS_INTERVAL: Duration = Duration::from_secs(60);

/// How many times the state of an io_uring is read, and the pause in between. The kernel leaves out most of it while
/// a thread works with the ring.
const RING_TRIES: u32 = 20;
const RING_PAUSE: Duration = Duration::from_millis(1);

/// The memory that programs lock for passwords, in KiB.
const FEW_LOCKED: u64 = 1 << 10;

/// Why memory must not be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Hazard {
    /// A device may have pinned the guest's pages.
    Pinned,
    /// The VMM has locked its memory.
    Locked,
    /// A userfaultfd handler fills the guest's memory.
    Userfaultfd,
    /// The pool of huge pages may be empty when the guest uses the page again.
    Hugetlb,
    /// The guest's memory is a file on a disk.
    DiskFile,
    /// The state of the VMM's process cannot be read, so it may have pinned or locked its memory.
    Unseen,
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::Locked => "locked",
            Self::Userfaultfd => "userfaultfd",
            Self::Hugetlb => "hugetlb",
            Self::DiskFile => "disk-file",
            Self::Unseen => "unseen",
        })
    }
}

impl Hazard {
    /// What it is, for the log.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Pinned => {
                "a device or another program has pinned the guest's memory (VFIO, vDPA, RDMA, io_uring), and \
                 would continue with the old pages"
            }
            Self::Locked => "the VMM has locked the guest's memory",
            Self::Userfaultfd => {
                "userfaultfd fills the VMM's memory, and old content could come back"
            }
            Self::Hugetlb => {
                "the guest's memory is in hugetlbfs, and the VM would end if the host had no huge page when the \
                 guest uses one again"
            }
            Self::DiskFile => "the guest's memory is a file on a disk",
            Self::Unseen => {
                "the daemon cannot read /proc/PID/status of the VMM, which may have pinned or locked the guest's \
                 memory (ProtectProc=, hidepid, another PID namespace)"
            }
        }
    }

    /// The hazards of discarding a file of the guest's memory.
    pub fn of_file(file: &File) -> Option<Self> {
        match fstatfs(file).map(|stat| stat.filesystem_type()) {
            Ok(TMPFS_MAGIC) => None,
            Ok(HUGETLBFS_MAGIC) => Some(Self::Hugetlb),
            _ => Some(Self::DiskFile),
        }
    }
}

/// The identity of a file: the numbers of its device and its inode.
pub type Identity = (u64, u64);

/// The state of the processes that use the guest's memory.
#[derive(Debug, Default)]
pub struct Watch {
    vmm: Option<i32>,
    files: BTreeSet<Identity>,
    /// What the VMM has pinned or locked.
    pinned: BTreeSet<Hazard>,
    /// The hazards of the VMM's open files.
    opened: BTreeSet<Hazard>,
    vmm_seen: Option<Instant>,
    /// What other processes do.
    others: BTreeSet<Hazard>,
    others_seen: Option<Instant>,
    /// Whether the access to the VMM's mappings was checked.
    mappings_seen: bool,
    /// Whether the daemon has logged that it cannot list the VMM's open files.
    warned: bool,
    /// Why no memory is returned, as it was logged for the last time.
    logged: BTreeSet<Hazard>,
}

impl Watch {
    /// The hazards of the processes that use these files of the guest's memory, a moment ago. `vmm` returns the VMM's
    /// process id while that is unknown.
    ///
    /// Reading the state of a process may take long, so the caller must not hold a lock that the
    /// front end waits for.
    pub fn hazards(
        &mut self,
        files: &BTreeSet<Identity>,
        vmm: impl FnOnce() -> Option<i32>,
    ) -> BTreeSet<Hazard> {
        self.vmm = self.vmm.or_else(vmm);
        if self.files != *files {
            self.files.clone_from(files);
            self.vmm_seen = None;
            self.others_seen = None;
        }
        if self.files.is_empty() {
            return BTreeSet::new();
        }
        self.look_at_mappings();
        if is_old(self.vmm_seen, VMM_INTERVAL) {
            self.look_at_vmm();
            self.vmm_seen = Some(Instant::now());
        }
        if is_old(self.others_seen, OTHERS_INTERVAL) {
            if let Ok(others) = others(&self.files, self.vmm) {
                self.others = others;
            }
            self.others_seen = Some(Instant::now());
        }
        &(&self.pinned | &self.opened) | &self.others
    }

    /// The supervisor refuses memory that is private to the VMM, if it can see that. A driver's messages in
    /// private memory do not arrive, and the device seems to have no driver.
    fn look_at_mappings(&mut self) {
        let Some(vmm) = self.vmm.filter(|_| !self.mappings_seen) else {
            return;
        };
        self.mappings_seen = true;
        if let Err(error) = Process::new(vmm).and_then(|vmm| vmm.maps()) {
            warn!(
                "cannot find out whether the VMM has shared the guest's memory: {error}; if the balloon stays without \
                 a driver, start the VMM with shared memory, as QEMU's memory-backend-memfd with share=on is"
            );
        }
    }

    /// Logs why no memory is returned to the host, when that has changed.
    pub fn log(&mut self, hazards: BTreeSet<Hazard>) {
        for hazard in &hazards - &self.logged {
            warn!(
                "memory is not returned to the host: {}; see --allow {hazard} for what to do",
                hazard.reason()
            );
        }
        if hazards.is_empty() && !self.logged.is_empty() {
            info!("memory is returned to the host again");
        }
        self.logged = hazards;
    }

    fn look_at_vmm(&mut self) {
        let vmm = self.vmm;
        self.note(
            vmm.and_then(|vmm| memory(&Process::new(vmm).ok()?).ok()),
            vmm.map(open_files),
        );
    }

    /// Records the result of reading the VMM's state. Earlier results stay if there is no new one.
    fn note(
        &mut self,
        pinned: Option<BTreeSet<Hazard>>,
        opened: Option<io::Result<BTreeSet<Hazard>>>,
    ) {
        match pinned {
            Some(pinned) => self.pinned = pinned,
            // There may be more by now.
            None => {
                self.pinned.insert(Hazard::Unseen);
                return;
            }
        }
        match opened {
            Some(Ok(opened)) => self.opened = opened,
            Some(Err(error)) if !self.warned => {
                self.warned = true;
                warn!(
                    "cannot list the files that the VMM has open: {error}; a userfaultfd or udmabuf of the VMM's \
                     is not seen, so send `inhibit` before one is used, or run the daemon as the VMM's user"
                );
            }
            _ => {}
        }
    }
}

fn is_old(seen: Option<Instant>, interval: Duration) -> bool {
    seen.is_none_or(|seen| seen.elapsed() > interval)
}

/// What a process has pinned or locked.
fn memory(process: &Process) -> ProcResult<BTreeSet<Hazard>> {
    let status = process.status()?;
    let pinned = status.vmpin.filter(|&kib| kib > 0);
    // VFIO counts what it pins as locked.
    let locked = status.vmlck.filter(|&kib| kib > FEW_LOCKED);
    Ok(pinned
        .map(|_| Hazard::Pinned)
        .into_iter()
        .chain(locked.map(|_| Hazard::Locked))
        .collect())
}

/// The open files of a process. The library's list of them omits unreadable ones.
fn open_files(process: i32) -> io::Result<BTreeSet<Hazard>> {
    let mut hazards = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        match of_open_file(&entry?.path()) {
            Ok(hazard) => hazards.extend(hazard),
            // It was closed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hazards)
}

/// The hazard of an open file, by its link in /proc.
fn of_open_file(link: &Path) -> io::Result<Option<Hazard>> {
    let target = fs::read_link(link)?.to_string_lossy().parse();
    Ok(match target {
        Ok(FDTarget::Path(path)) => is_pinning(link, &path).then_some(Hazard::Pinned),
        Ok(FDTarget::AnonInode(name)) if name.contains("io_uring") => {
            has_buffers(link)?.then_some(Hazard::Pinned)
        }
        Ok(FDTarget::AnonInode(name)) => of_anonymous(&name),
        _ => None,
    })
}

/// Whether an io_uring, by its link in /proc, may have fixed buffers. The kernel does not count them as pinned memory if
/// the process could lock any amount of memory (`CAP_IPC_LOCK`) when it set up the ring.
fn has_buffers(link: &Path) -> io::Result<bool> {
    let (process, number) = (link.parent().and_then(Path::parent), link.file_name());
    let Some((process, number)) = process.zip(number) else {
        return Ok(false);
    };
    let file = process.join("fdinfo").join(number);
    for _ in 0..RING_TRIES {
        let information = fs::read_to_string(&file)?;
        let mut lines = information.lines();
        if let Some(buffers) = lines.find_map(|line| line.strip_prefix("UserBufs:")) {
            return Ok(buffers.trim() != "0");
        }
        thread::sleep(RING_PAUSE);
    }
    // It may have some.
    Ok(true)
}

/// The hazard of a file that has a type, and no path.
fn of_anonymous(name: &str) -> Option<Hazard> {
    if name.contains("vfio") {
        return Some(Hazard::Pinned);
    }
    name.contains("userfaultfd").then_some(Hazard::Userfaultfd)
}

/// The hazards of other processes that have mapped one of these files, as far as they can be read.
fn others(files: &BTreeSet<Identity>, vmm: Option<i32>) -> ProcResult<BTreeSet<Hazard>> {
    let me = i32::try_from(process::id()).ok();
    Ok(all_processes()?
        .filter_map(|process| {
            let process = process.ok()?;
            if [vmm, me].contains(&Some(process.pid)) {
                return None;
            }
            // Few processes have mapped one, and looking at open files takes longer.
            if !maps(&process, files) {
                return None;
            }
            let mut hazards = memory(&process).unwrap_or_default();
            let opened = open_files(process.pid).unwrap_or_default();
            hazards.extend(opened.get(&Hazard::Pinned));
            Some(hazards)
        })
        .flatten()
        .collect())
}

fn maps(process: &Process, files: &BTreeSet<Identity>) -> bool {
    let is_one = |&(device, inode): &Identity, map: &procfs::process::MemoryMap| {
        let numbers = (map.dev.0.try_into(), map.dev.1.try_into());
        map.inode == inode && numbers == (Ok(major(device)), Ok(minor(device)))
    };
    process.maps().is_ok_and(|maps| {
        maps.iter()
            .any(|map| files.iter().any(|file| is_one(file, map)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_file;
    use crate::testing::pinned::{Pinned, has_pinned};
    use std::env;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    #[test]
    fn anonymous_files_are_known_by_their_type() {
        for (name, hazard) in [
            ("[userfaultfd]", Some(Hazard::Userfaultfd)),
            ("[vfio-device]", Some(Hazard::Pinned)),
            ("[eventfd]", None),
            ("kvm-vm", None),
        ] {
            assert_eq!(of_anonymous(name), hazard, "{name}");
        }
    }

    #[test]
    fn files_are_told_by_their_file_system() {
        assert_eq!(Hazard::of_file(&memory_file(4096)), None);
        // The sources are on a disk.
        let disk = File::open(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(Hazard::of_file(&disk), Some(Hazard::DiskFile));
    }

    #[test]
    fn huge_pages_are_told_without_having_some() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let file = File::from(memfd_create("guest", flags).unwrap());
        assert_eq!(Hazard::of_file(&file), Some(Hazard::Hugetlb));
    }

    /// Some memory of a guest.
    fn files() -> BTreeSet<Identity> {
        BTreeSet::from([(1, 2)])
    }

    #[test]
    fn an_ordinary_process_is_no_hazard() {
        let hazards = Watch::default().hazards(&files(), || i32::try_from(process::id()).ok());
        assert_eq!(hazards, BTreeSet::new());
    }

    #[test]
    fn a_vmm_that_cannot_be_seen_is_a_hazard() {
        assert_eq!(
            Watch::default().hazards(&BTreeSet::new(), || None),
            BTreeSet::new(),
            "there is no memory yet"
        );
        assert_eq!(
            Watch::default().hazards(&files(), || None),
            BTreeSet::from([Hazard::Unseen])
        );

        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut watch = Watch::default();
        watch.pinned.insert(Hazard::Pinned);
        assert_eq!(
            watch.hazards(&files(), || Some(pid)),
            BTreeSet::from([Hazard::Pinned, Hazard::Unseen])
        );
    }

    #[test]
    fn what_the_vmm_has_open_is_listed() {
        let file = File::open("/dev/null").unwrap();
        let mine = i32::try_from(process::id()).unwrap();
        assert_eq!(open_files(mine).unwrap(), BTreeSet::new());
        drop(file);
        assert!(open_files(0).is_err());
    }

    #[test]
    fn a_hazard_stays_while_it_cannot_be_looked_for() {
        let mut watch = Watch::default();
        let found = BTreeSet::from([Hazard::Userfaultfd]);
        let none = BTreeSet::new;
        watch.note(Some(none()), Some(Ok(found.clone())));
        assert!(!watch.warned);
        // There is no file descriptor left, for example.
        for _ in 0..2 {
            watch.note(Some(none()), Some(Err(ErrorKind::PermissionDenied.into())));
            assert_eq!((&watch.opened, watch.warned), (&found, true));
        }
        watch.note(Some(none()), Some(Ok(none())));
        assert_eq!(watch.opened, none());
    }

    #[test]
    fn what_another_process_pins_later_is_found() {
        const FILE: &str = "BALLOON_TEST_FILE";
        const TEST: &str = "memory::hazard::tests::what_another_process_pins_later_is_found";
        if let Some(file) = env::var_os(FILE) {
            // This is the other process, which ends with the test's end of the pipe.
            let file = File::options().read(true).write(true).open(file);
            let pinned = Pinned::new(&file.unwrap(), 0);
            io::stdin().read_to_end(&mut Vec::new()).unwrap();
            assert_eq!(pinned.byte(), 0);
            return;
        }
        let file = memory_file(4096);
        let metadata = file.metadata().unwrap();
        let files = BTreeSet::from([(metadata.dev(), metadata.ino())]);
        let mine = process::id();
        let mut watch = Watch::default();
        let mut hazards_later = || {
            watch.others_seen = Instant::now().checked_sub(OTHERS_INTERVAL * 2);
            watch.hazards(&files, || i32::try_from(mine).ok())
        };
        assert_eq!(hazards_later(), BTreeSet::new());

        let mut other = Command::new(env::current_exe().unwrap())
            .args(["--exact", TEST])
            .env(FILE, format!("/proc/{mine}/fd/{}", file.as_raw_fd()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while !has_pinned(&other) {
            assert_eq!(other.try_wait().unwrap(), None, "it has ended");
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(hazards_later(), BTreeSet::from([Hazard::Pinned]));
        drop(other.stdin.take());
        assert!(other.wait().unwrap().success());
        assert_eq!(hazards_later(), BTreeSet::new());
    }

    #[test]
    fn the_service_sees_the_vmm() {
        let unit = include_str!("../../systemd/vhost-user-balloon@.service");
        let values: Vec<_> = unit
            .lines()
            .filter_map(|line| line.strip_prefix("ProtectProc="))
            .collect();
        assert_eq!(values, ["default"]);
    }
}
