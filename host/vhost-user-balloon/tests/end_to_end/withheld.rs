// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is not returned to the host.

use super::pinned::{Pinned, has_pinned};
use super::requests::RECLAIM;
use super::*;
use balloon_control::Metrics;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{self, Stdio};

/// Longer than the daemon relies on what it knows of the VMM.
const OLD: Duration = Duration::from_millis(200);

/// Whether a test has this process for itself. If not, it was run in another process: all daemons with this
/// process as VMM would see its pinned memory.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "BALLOON_TEST_ALONE";
    let alone = env::var_os(ALONE).is_some();
    if !alone {
        let mut test_again = Command::new(env::current_exe().unwrap());
        let test = format!("withheld::{test}");
        test_again.args(["--exact", &test]).env(ALONE, "1");
        let output = test_again.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
    }
    alone
}

#[test]
fn pinned_memory_stays_where_it_is() {
    if !is_alone("pinned_memory_stays_where_it_is") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    let mut vmm = Vmm::connect(directory);
    vmm.start(0);
    vmm.inflate(0x100);
    assert_eq!(vmm.byte(0x100 << 12), 0);
    assert_eq!(info(directory).withheld, [""; 0]);

    // From now on a device of the VMM has pinned the next page.
    let pinned = Pinned::new(&vmm.memory, 0x101 << 12);
    thread::sleep(OLD);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 1);
    // The guest deflates it, and device and guest have the same page.
    vmm.store(0x101 << 12, &[7]);
    assert_eq!(pinned.byte(), 7);
    let now = info(directory);
    assert_eq!(now.withheld, ["pinned"]);
    assert_eq!(now.counters.withheld, 1 << 12);
    assert_eq!(now.counters.discarded, 1 << 12);
    let reclaim = call(directory, &RECLAIM).unwrap_err();
    assert!(reclaim.to_string().contains("pinned"), "{reclaim}");

    drop(pinned);
    wait_for("the end of the ring", || {
        info(directory).withheld.is_empty()
    });
    vmm.inflate(0x102);
    assert_eq!(vmm.byte(0x102 << 12), 0);
    daemon.end();
}

#[test]
fn memory_that_another_process_has_pinned_is_left_alone() {
    const FILE: &str = "BALLOON_TEST_FILE";
    const PAGE: u64 = 0x101 << 12;
    if let Some(file) = env::var_os(FILE) {
        // This is the other process, which ends with the test's end of the pipe.
        let file = File::options().read(true).write(true).open(file);
        let _pinned = Pinned::new(&file.unwrap(), PAGE);
        io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    let mut vmm = Vmm::connect(directory);
    let memory = format!("/proc/{}/fd/{}", process::id(), vmm.memory.as_raw_fd());
    let test = "withheld::memory_that_another_process_has_pinned_is_left_alone";
    let mut other = Command::new(env::current_exe().unwrap())
        .args(["--exact", test])
        .env(FILE, memory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the pinned page", || has_pinned(&other));
    // The daemon checks other processes when memory is added.
    vmm.start(0);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(PAGE), 1);
    assert_eq!(info(directory).withheld, ["pinned"]);
    drop(other.stdin.take());
    assert!(other.wait().unwrap().success());
    daemon.end();
}

/// A userfaultfd of this process, if the system lets it have one.
fn userfaultfd() -> Option<OwnedFd> {
    // SAFETY: The call takes flags only.
    #[expect(unsafe_code, reason = "the library has no function for this call")]
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let number = number.try_into().ok().filter(|&number| number >= 0)?;
    // SAFETY: The call has just returned it, and nothing else has it.
    #[expect(unsafe_code, reason = "the kernel has returned a number")]
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    Some(file)
}

#[test]
fn memory_that_a_handler_fills_is_left_alone() {
    if !is_alone("memory_that_a_handler_fills_is_left_alone") {
        return;
    }
    let Some(handler) = userfaultfd() else {
        return;
    };
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    assert_eq!(vmm.byte(0x100 << 12), 1);
    assert_eq!(info(directory).withheld, ["userfaultfd"]);
    drop(handler);
    wait_for("the end of the handler", || {
        info(directory).withheld.is_empty()
    });
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    daemon.end();
}

#[test]
fn a_handler_that_comes_later_is_found_and_logged() {
    if !is_alone("a_handler_that_comes_later_is_found_and_logged") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let log = directory.join("log");
    let mut daemon = command(directory);
    daemon.stderr(File::create(&log).unwrap());
    let daemon = Running(daemon.spawn().unwrap());
    wait_for("the daemon", || call(directory, &Request::Info {}).is_ok());
    let metrics = || {
        let metrics = call(directory, &Request::Metrics {}).unwrap();
        metrics.parse::<Metrics>().unwrap().text
    };
    let log = || fs::read_to_string(&log).unwrap();
    let mut vmm = inflated(directory);
    assert_eq!(vmm.byte(0x100 << 12), 0);
    assert!(metrics().contains("\nballoon_withheld 0\n"));

    let Some(handler) = userfaultfd() else {
        return;
    };
    thread::sleep(OLD);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 1);
    assert!(
        log().contains("memory is not returned to the host: userfaultfd fills the VMM's memory")
    );
    assert_eq!(info(directory).withheld, ["userfaultfd"]);
    let found = metrics();
    assert!(found.contains("\nballoon_withheld 1\n"), "{found}");
    assert!(found.contains("\nballoon_withheld_bytes_total 4096\n"));

    drop(handler);
    thread::sleep(OLD);
    vmm.inflate(0x102);
    assert_eq!(vmm.byte(0x102 << 12), 0);
    assert!(log().contains("memory is returned to the host again"));
    daemon.end();
}

#[test]
fn mappings_that_cannot_be_read_are_logged() {
    const NOBODY: u32 = 65534;
    // Only root can change the user.
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let program = program_for_others(directory);
    let log = directory.join("log");
    let daemon = command_of(&program, directory)
        .uid(NOBODY)
        .gid(NOBODY)
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let daemon = Running(daemon);
    let control = directory.join("control");
    wait_for("the daemon", || Client::connect(&control).is_ok());
    let mut vmm = Vmm::connect(directory);
    vmm.start(0);
    wait_for("a warning", || {
        let log = fs::read_to_string(&log).unwrap();
        log.contains("cannot find out whether the VMM has shared the guest's memory")
    });
    daemon.end();
}

#[test]
fn an_operator_may_allow_what_is_pinned() {
    if !is_alone("an_operator_may_allow_what_is_pinned") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--allow", "pinned"]);
    let mut vmm = Vmm::connect(directory);
    let _pinned = Pinned::new(&vmm.memory, 0x101 << 12);
    vmm.start(0);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    assert_eq!(info(directory).withheld, [""; 0]);
    daemon.end();
}

fn inhibit(seconds: u64) -> Request {
    Request::Inhibit {
        seconds,
        owner: None,
    }
}

#[test]
fn a_client_inhibits_discarding_for_a_while() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    for seconds in [0, 86401] {
        let error = call(directory, &inhibit(seconds)).unwrap_err();
        assert!(
            matches!(error, ClientError::Refused(error) if error.kind == ErrorKind::OutOfRange)
        );
    }
    call(directory, &inhibit(3600)).unwrap();
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 1);
    let now = info(directory);
    assert_eq!(now.withheld, ["inhibited"]);
    assert!(
        now.inhibited
            .is_some_and(|rest| (3590..=3600).contains(&rest))
    );
    // Another client needs it for a shorter time.
    call(directory, &inhibit(1)).unwrap();
    assert!(info(directory).inhibited.is_some_and(|rest| rest > 3000));

    // Another worker knows it.
    let pid = Pid::from_raw(daemon.0.id().try_into().unwrap());
    kill(pid, Signal::SIGHUP).unwrap();
    wait_for("another process", || {
        // The old worker may end in the middle of an answer.
        let now = call(directory, &Request::Info {}).and_then(|answer| answer.parse::<Info>());
        now.is_ok_and(|now| now.counters.inflated == 0 && now.guest.driver)
    });
    vmm.inflate(0x102);
    assert_eq!(vmm.byte(0x102 << 12), 1);

    call(directory, &Request::Resume { owner: None }).unwrap();
    vmm.inflate(0x103);
    assert_eq!(vmm.byte(0x103 << 12), 0);
    assert_eq!(info(directory).withheld, [""; 0]);

    call(directory, &inhibit(1)).unwrap();
    wait_for("the end of the time", || {
        info(directory).withheld.is_empty()
    });
    vmm.inflate(0x104);
    assert_eq!(vmm.byte(0x104 << 12), 0);
    daemon.end();
}

#[test]
fn memory_in_a_file_on_a_disk_is_left_alone() {
    for (arguments, withheld, byte) in [
        (&[][..], &["disk-file"][..], 1),
        (&["--allow", "disk-file"], &[], 0),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let daemon = start(directory, arguments);
        let mut vmm = Vmm::connect(directory);
        // The build directory is on a disk.
        let disk = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let file = tempfile::tempfile_in(disk).unwrap();
        let mut memory = vec![0; usize::try_from(MEMORY).unwrap()];
        vmm.memory.read_exact_at(&mut memory, 0).unwrap();
        file.write_all_at(&memory, 0).unwrap();
        vmm.memory = file;
        vmm.start(0);
        vmm.inflate(0x100);
        assert_eq!(vmm.byte(0x100 << 12), byte);
        assert_eq!(info(directory).withheld, withheld);
        assert_eq!(info(directory).resident, None);
        daemon.end();
    }
}
