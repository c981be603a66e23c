// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The system calls that a worker must not make.

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::waitpid;

use super::supervision::{log, start_logged, wait_for_line};
use super::*;

/// The number of the system call, on x86-64.
#[cfg(target_arch = "x86_64")]
const UNSHARE: u64 = 272;

/// The value of this line in the status of each thread of a process. A thread may end meanwhile.
fn of_threads(process: Pid, name: &str) -> Vec<String> {
    fs::read_dir(format!("/proc/{process}/task"))
        .unwrap()
        .filter_map(|thread| {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).ok()?;
            let mut values = status.lines().filter_map(|line| line.strip_prefix(name));
            Some(values.next().unwrap().trim().to_owned())
        })
        .collect()
}

/// Makes the first thread of a process, which waits in a system call, make another one. Returns whether this process
/// has the permission for that.
#[cfg(target_arch = "x86_64")]
fn have_call(process: Pid, call: u64) -> bool {
    /// The length of the instruction `syscall`.
    const LENGTH: u64 = 2;
    match ptrace::attach(process) {
        Err(Errno::EPERM) => return false,
        other => other.unwrap(),
    }
    waitpid(process, None).unwrap();
    let mut registers = ptrace::getregs(process).unwrap();
    registers.rip -= LENGTH;
    registers.rax = call;
    // The kernel does not restart the interrupted call.
    registers.orig_rax = u64::MAX;
    ptrace::setregs(process, registers).unwrap();
    ptrace::detach(process, None).unwrap();
    true
}

#[test]
fn each_thread_of_the_worker_is_confined() {
    let (directory, daemon, _vmm) = set_up();
    let _client = Client::connect(&directory.path().join("control")).unwrap();
    let worker = daemon.worker();
    wait_for("the threads", || of_threads(worker, "Name:").len() >= 4);
    for seccomp in of_threads(worker, "Seccomp:") {
        assert_eq!(seccomp, "2", "{:?}", of_threads(worker, "Name:"));
    }
    daemon.end();

    let daemon = start(directory.path(), &["--sandbox", "none"]);
    assert!(!of_threads(daemon.worker(), "Seccomp:").contains(&"2".to_owned()));
    daemon.end();
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_call_that_is_not_allowed_ends_the_worker() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut vmm = inflated(directory);
    let worker = daemon.worker();
    if !have_call(worker, UNSHARE) {
        return;
    }
    wait_for_line(
        directory,
        "the sandbox does not allow the system call 272 (unshare), and ends the worker",
    );
    daemon.wait_for_another(worker);
    // The VM has its balloon.
    assert_eq!(vmm.config().len(), 16);
    wait_for("the driver", || {
        Client::connect(&directory.join("control"))
            .and_then(|mut client| client.call(&Request::Info {}))
            .is_ok_and(|answer| answer.parse::<Info>().is_ok_and(|now| now.guest.driver))
    });
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    assert_eq!(log(directory).matches("the sandbox").count(), 1);
    daemon.end();
}
