// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory in huge pages.

use super::supervision::{wait_for_info, works};
use super::*;

/// The size of a huge page of shared memory, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Mounts a tmpfs with the options `$1` at `$2` in a namespace of its own, and runs a daemon there.
const MOUNT: &str = r#"
    mount -t tmpfs -o "$1" tmpfs "$2"
    shift 2
    exec "$@"
"#;

/// A daemon that sees a tmpfs with these options in a directory.
fn start_with_tmpfs(directory: &Path, options: &str) -> (Running, File) {
    let place = directory.join("tmpfs");
    fs::create_dir(&place).unwrap();
    let daemon = command(directory);
    let mut unshare = Command::new("unshare");
    unshare
        .args([
            "--mount",
            "--propagation=unchanged",
            "sh",
            "-euc",
            MOUNT,
            "sh",
            options,
        ])
        .arg(&place)
        .arg(daemon.get_program())
        .args(daemon.get_args());
    let daemon = Running(unshare.spawn().unwrap());
    wait_for("the daemon", || {
        Client::connect(&directory.join("control")).is_ok()
    });
    let path = format!("/proc/{}/root{}/memory", daemon.0.id(), place.display());
    let mut file = File::options();
    let file = file.create(true).read(true).write(true).open(path);
    (daemon, file.unwrap())
}

/// How much memory of the host the guest's memory takes.
fn held(vmm: &Vmm) -> u64 {
    vmm.memory.metadata().unwrap().blocks() * 512
}

/// Whether the test can mount a tmpfs with huge pages, for which it needs root, and the host has left that to mounts.
fn can_mount() -> bool {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    setting.is_ok_and(|text| !text.contains("[deny]") && !text.contains("[force]"))
        && fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn a_tmpfs_with_huge_pages_is_given_back_in_huge_pages() {
    if !can_mount() {
        return;
    }
    for (options, granule) in [
        ("size=64M", 4096),
        ("huge=never", 4096),
        ("huge=always", HUGE_PAGE),
        ("huge=within_size", HUGE_PAGE),
        ("huge=advise", HUGE_PAGE),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let (daemon, file) = start_with_tmpfs(directory, options);
        // With large granules the device asks the driver to notify it before it reuses a page.
        let features = u64::from(granule == HUGE_PAGE) << VIRTIO_BALLOON_F_MUST_TELL_HOST;
        let mut vmm = Vmm::connect_with(directory, features);
        let mut memory = vec![0; usize::try_from(MEMORY).unwrap()];
        vmm.memory.read_exact_at(&mut memory, 0).unwrap();
        file.write_all_at(&memory, 0).unwrap();
        vmm.memory = file;
        vmm.start(0);
        wait_for_info("memory", directory, |now| now.shared == Some(MEMORY));
        assert_eq!(info(directory).granule, granule, "{options}");

        let before = held(&vmm);
        // One page of the second huge page, and then the others.
        let first = u32::try_from(HUGE_PAGE >> 12).unwrap();
        vmm.inflate(first);
        let one = if granule == HUGE_PAGE { 0 } else { 4096 };
        assert_eq!(info(directory).counters.discarded, one, "{options}");
        assert_eq!(before - held(&vmm), one, "{options}");
        let pages = (first + 1..2 * first).flat_map(u32::to_le_bytes);
        vmm.send(&pages.collect::<Vec<_>>());
        let counters = info(directory).counters;
        assert_eq!(
            (counters.inflated, counters.discarded),
            (HUGE_PAGE, HUGE_PAGE),
            "{options}"
        );
        assert_eq!(before - held(&vmm), HUGE_PAGE, "{options}");
        daemon.end();
    }
}

#[test]
fn another_worker_offers_what_the_driver_has_accepted() {
    if !can_mount() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (daemon, _) = start_with_tmpfs(directory, "huge=always");
    let mut vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_MUST_TELL_HOST);
    vmm.start(0);
    works(directory, &mut vmm, 0x100);
    // The host has no huge pages any more.
    let target = format!("--target={}", daemon.0.id());
    let unmounted = Command::new("nsenter")
        .args([&target, "--mount", "--root", "umount"])
        .arg(directory.join("tmpfs"))
        .status();
    assert!(unmounted.unwrap().success());
    let worker = daemon.worker();
    kill(worker, Signal::SIGKILL).unwrap();
    daemon.wait_for_another(worker);
    works(directory, &mut vmm, 0x101);
    daemon.end();
}
