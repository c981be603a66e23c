// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that the daemon must not discard, that the host allocates for a reader, or that the host may lack when the
//! guest uses it again.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use balloon_control::Info;
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};
use vm::{Guest, HugePages, Load, MemoryBackend, Size};

use crate::reporting::FAST_REPORTS;
use crate::scenario::{
    BOTH_DRIVERS, EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
    VHOST_USER_DEVICE,
};
use crate::sizes::check_size;
use crate::vhost_user::{balloonctl, wait_driver};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "withheld_memory",
        proves: "the daemon does not discard memory in huge pages, locked memory, and memory in a file on a disk, and logs the reason",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: withheld_memory,
    },
    Scenario {
        name: "inhibit",
        proves: "a client stops the daemon from discarding memory, for as long as it requests",
        kernels: TEST_KERNEL,
        drivers: BOTH_DRIVERS,
        devices: VHOST_USER_DEVICE,
        run: inhibit,
    },
    Scenario {
        name: "memory_dump",
        proves: "the host has the memory of the balloon again after a dump of the VM",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: memory_dump,
    },
    Scenario {
        name: "full_tmpfs",
        proves: "a guest waits for memory that it deflates while its tmpfs is full",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: full_tmpfs,
    },
];

/// How much memory the guest uses before it inflates a part of it.
const USED: Size = Size::mib(250);

/// The size of the balloon.
const SIZE: Size = Size::mib(200);

/// Makes the guest use memory, free it, and inflate a part of it, and checks that the daemon has
/// discarded none of it.
fn keeps(setup: &Setup, guest: &Guest, reason: &str) -> Result<Info> {
    let daemon = guest.daemon()?;
    guest.touch(USED)?;
    guest.balloon().settle(SIZE)?;
    check_size(guest, SIZE)?;
    let info = daemon.info()?;
    ensure!(
        info.withheld == [reason] && info.counters.discarded == 0 && info.counters.withheld > 0,
        "the device says {info:?}"
    );
    let run = |arguments: &[&str]| balloonctl(setup, &daemon.control(), arguments, 0);
    for (arguments, words) in [
        (["info"], format!(": {reason}")),
        (["metrics"], "balloon_withheld 1".to_owned()),
    ] {
        let text = run(&arguments)?;
        ensure!(text.contains(&words), "{words} is not in:\n{text}");
    }
    Ok(info)
}

fn withheld_memory(setup: &Setup) -> Result<()> {
    let memory = Size::mib(512);
    let pages = HugePages::reserve(memory)?;
    fs::create_dir_all(setup.logs())?;
    let disk = NamedTempFile::new_in(setup.logs())?;
    let config = setup
        .config()
        .memory(memory)
        .daemon_defaults()
        .parameter(FAST_REPORTS);
    for (config, reason) in [
        (config.clone().backend(MemoryBackend::Hugetlb), "hugetlb"),
        (
            config.clone().argument("-overcommit", "mem-lock=on"),
            "locked",
        ),
        (config.memory_file(disk.path()), "disk-file"),
    ] {
        vm::run(&config, |guest| {
            guest.insmod(setup.driver, &[])?;
            wait_driver(guest)?;
            guest.touch(USED)?;
            let before = pages.free()?;
            keeps(setup, guest, reason)?;
            let now = pages.free()?;
            ensure!(
                now <= before,
                "{before} of huge pages were free, and {now} are"
            );
            let log = guest.daemon()?.log()?;
            ensure!(
                log.contains(&format!("see --allow {reason} ")),
                "the daemon says {log}"
            );
            guest.balloon().settle(Size::default())?;
            guest.touch(USED)?;
            guest.rmmod(setup.driver)
        })?;
    }
    Ok(())
}

fn inhibit(setup: &Setup) -> Result<()> {
    let config = setup.config().daemon_argument("--granule=4K");
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        let daemon = guest.daemon()?;
        let run = |arguments: &[&str]| balloonctl(setup, &daemon.control(), arguments, 0);
        run(&["inhibit"])?;
        let kept = keeps(setup, guest, "inhibited")?.counters.withheld;
        for end in [&["resume"][..], &["inhibit", "--for", "1"]] {
            guest.balloon().settle(Size::default())?;
            guest.touch(USED)?;
            let before = daemon.info()?.counters.discarded;
            run(end)?;
            guest.wait_until("memory that the daemon discards again", PATIENCE, || {
                Ok(daemon.info()?.withheld.is_empty())
            })?;
            guest.balloon().settle(SIZE)?;
            let counters = daemon.info()?.counters;
            ensure!(
                counters.discarded == before + SIZE.as_bytes() && counters.withheld == kept,
                "after {end:?} the device says {counters:?}"
            );
        }
        guest.rmmod(setup.driver)
    })
}

fn memory_dump(setup: &Setup) -> Result<()> {
    let (memory, used, size) = (Size::mib(512), Size::mib(350), Size::mib(200));
    fs::create_dir_all(setup.logs())?;
    let copy = NamedTempFile::new_in(setup.logs())?;
    let config = setup.config().memory(memory);
    vm::run(&config.daemon_argument("--granule=4K"), |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        guest.touch(used)?;
        guest.balloon().settle(size)?;
        let load = guest.load(Load::Hold {
            mib: 32,
            threads: 1,
        })?;
        let file = guest.memory_file()?;
        let before = file.resident()?;
        let qmp = guest.qmp();
        let protocol = format!("file:{}", copy.path().display());
        let arguments = json!({ "paging": false, "protocol": protocol });
        qmp.execute::<Value>("stop", &json!({}))?;
        qmp.execute::<Value>("dump-guest-memory", &arguments)?;
        let dumped = file.resident()?;
        qmp.execute::<Value>("cont", &json!({}))?;
        ensure!(
            dumped >= before + size,
            "the guest's memory took {before}, and {dumped} during the dump"
        );
        // The dump has read all of memory, so the host has allocated all but the balloon.
        guest.wait_until("the balloon's memory", PATIENCE, || {
            Ok(file.resident()? <= memory - size + Size::mib(1))
        })?;
        let after = file.resident()?;
        setup.note(format!(
            "the guest's memory takes {before}, {dumped} during the dump, and {after} after it"
        ));
        check_size(guest, size)?;
        guest.balloon().settle(Size::default())?;
        guest.touch(used)?;
        load.verify(1)?;
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

/// A tmpfs of a limited size, unmounted when this is dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// Needs root.
    fn mount(size: Size) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mounted = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={}", size.as_bytes()),
                "tmpfs",
            ])
            .arg(directory.path())
            .status()?;
        ensure!(mounted.success(), "no tmpfs can be mounted");
        Ok(Self(directory))
    }

    /// Writes a file until the file system is full.
    fn fill(&self) -> Result<File> {
        let file = tempfile::tempfile_in(self.0.path())?;
        let ones = vec![1; 1 << 20];
        for place in (0..).step_by(ones.len()) {
            match file.write_all_at(&ones, place) {
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                result => result?,
            }
        }
        Ok(file)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // It goes away with the tests' mount namespace in any case.
        let _: io::Result<_> = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn full_tmpfs(setup: &Setup) -> Result<()> {
    let (used, size) = (Size::mib(800), Size::mib(600));
    let tmpfs = Tmpfs::mount(Size::mib(1200))?;
    // Otherwise the guest would at once need memory that the file system lacks.
    let config = setup
        .config()
        .memory_file(&tmpfs.0.path().join("memory"))
        .preallocated();
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        wait_driver(guest)?;
        let daemon = guest.daemon()?;
        guest.touch(used)?;
        guest.balloon().settle(size)?;
        let file = tmpfs.fill()?;
        let filled = Size::bytes(file.metadata()?.len());
        guest.balloon().request(Size::default())?;
        let failures = || -> Result<u64> { Ok(daemon.info()?.counters.prefault_failures) };
        guest.wait_until("a device that has no memory", PATIENCE, || {
            Ok(failures()? > 2)
        })?;
        thread::sleep(Duration::from_secs(1));
        let left = guest.balloon().size()?;
        setup.note(format!(
            "{left} stay in the balloon while {filled} of the tmpfs are another file's"
        ));
        ensure!(left > Size::mib(100), "{left} are left in the balloon");
        guest.meminfo()?;
        drop(file);
        guest.balloon().reach(Size::default())?;
        guest.touch(used)?;
        guest.rmmod(setup.driver)
    })
}
