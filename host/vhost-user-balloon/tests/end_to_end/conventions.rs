// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's conventions for the programs of back ends.

use std::os::unix::net::UnixListener;
use std::process::{Output, Stdio};

use serde_json::Value;

use super::supervision::{log, wait_for_line};
use super::*;

/// A daemon that gets its standard input as the file descriptor 7 from a shell.
fn with_descriptor(directory: &Path, input: impl Into<Stdio>) -> Command {
    let log = File::create(directory.join("log")).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"exec "$@" 7<&0 0</dev/null"#, "sh", PROGRAM])
        .args(["--fd=7", "--control"])
        .arg(directory.join("control"))
        .stdin(input)
        .stderr(log);
    command
}

#[test]
fn a_socket_is_received_as_a_file_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let listener = UnixListener::bind(directory.join("socket")).unwrap();
    let daemon = with_descriptor(directory, std::os::fd::OwnedFd::from(listener));
    let daemon = Running({ daemon }.spawn().unwrap());
    wait_for("the daemon", || {
        Client::connect(&directory.join("control")).is_ok()
    });
    let mut vmm = inflated(directory);
    // The next program has another descriptor of that number, or none.
    let pid = Pid::from_raw(daemon.0.id().try_into().unwrap());
    kill(pid, Signal::SIGHUP).unwrap();
    wait_for_line(directory, "continuing with the VMM that is connected");
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    drop(vmm);
    wait_for("the end of the VMM", || !info(directory).guest.connected);
    drop(inflated(directory));
    daemon.end();
    assert!(directory.join("socket").exists() && !directory.join("control").exists());
}

#[test]
fn other_file_descriptors_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (connected, _other) = UnixStream::pair().unwrap();
    for input in [Stdio::null(), std::os::fd::OwnedFd::from(connected).into()] {
        let status = with_descriptor(directory, input).status().unwrap();
        assert_eq!(status.code(), Some(1));
        let log = log(directory);
        assert!(log.contains("7, which --fd names, is no socket that listens"));
    }
    // Without a socket the lowest number is the first one that the daemon opens.
    for (number, error) in [
        (99, "there is no file descriptor"),
        (3, "the file descriptor"),
    ] {
        let output = Command::new(PROGRAM)
            .arg(format!("--fd={number}"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let log = String::from_utf8(output.stderr).unwrap();
        let line = format!("{error} {number}, which --fd names");
        assert!(log.contains(&line), "{log}");
    }
}

#[test]
fn a_socket_with_a_relative_path_is_refused() {
    let here = std::env::current_dir().unwrap();
    let directory = tempfile::tempdir_in(&here).unwrap();
    let directory = directory.path();
    let path = directory.strip_prefix(&here).unwrap().join("socket");
    let listener = UnixListener::bind(path).unwrap();
    let input = std::os::fd::OwnedFd::from(listener);
    let status = with_descriptor(directory, input).status().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(log(directory).contains("7, which --fd names, has no absolute path"));
}

#[test]
fn a_manager_finds_the_program() {
    let run =
        |arguments: &[&str]| -> Output { Command::new(PROGRAM).args(arguments).output().unwrap() };
    let output = run(&["--print-capabilities", "--socket-path", "/no/such/place"]);
    assert!(output.status.success());
    let capabilities: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities, serde_json::json!({ "type": "balloon" }));
    let manifest = include_str!("../../50-vhost-user-balloon.json");
    let manifest: Value = serde_json::from_str(manifest).unwrap();
    assert_eq!(manifest["type"], "balloon");
    assert_eq!(manifest["binary"], "/usr/bin/vhost-user-balloon");
    assert!(manifest["description"].is_string());
}
