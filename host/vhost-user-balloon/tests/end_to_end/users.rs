// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon and a QEMU of two users.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use super::wrong_options::{Qemu, RIGHT, SHARED, has_qemu};
use super::*;

/// No user and no group of the machine has one of these numbers.
const DAEMON: u32 = 64_001;
const QEMU: u32 = 64_002;
const GROUP: u32 = 64_003;

#[test]
fn a_qemu_of_another_user_connects_if_it_is_in_the_group() {
    // Only root can change the user.
    if !has_qemu() || fs::metadata("/proc/self").unwrap().uid() != 0 {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let program = program_for_others(directory);
    let daemon = command_of(&program, directory)
        .args(["--socket-group", &GROUP.to_string()])
        .uid(DAEMON)
        .gid(GROUP)
        .spawn();
    let daemon = Running(daemon.unwrap());
    wait_for("the daemon", || {
        Client::connect(&directory.join("control")).is_ok()
    });
    let socket = directory.join("socket");
    let metadata = fs::metadata(&socket).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o777),
        (DAEMON, GROUP, 0o660)
    );

    let qemu = |group: u32| {
        let mut command = Qemu::command(&socket, SHARED, &[RIGHT.device]);
        command.uid(QEMU).gid(group).current_dir("/");
        command
    };
    let refused = qemu(QEMU).stdin(Stdio::null()).output().unwrap();
    assert!(!refused.status.success());
    let line = String::from_utf8_lossy(&refused.stderr);
    assert!(
        line.contains(&format!("{}': Permission denied", socket.display())),
        "{line}"
    );
    assert!(!info(directory).guest.connected);

    let mut accepted = Qemu::spawn(&mut qemu(GROUP));
    accepted.run(&RIGHT, directory).unwrap();
    assert_eq!(info(directory).withheld, [""; 0]);
    // QEMU aborts if the daemon ends first.
    drop(accepted);
    daemon.end();
}
