// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Targets of several clients.

use balloon_control::{ControlError, Lease};

use super::events::{subscribe, wait_for_state};
use super::supervision::{start_logged, wait_for_info, wait_for_line};
use super::*;

/// Sets a target if another one is in force.
fn replace(directory: &Path, expected: u64, bytes: u64) -> Result<Answer, ClientError> {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    client.call(&Request::Set {
        bytes,
        expected: Some(expected),
        lease: None,
        fallback: None,
        owner: None,
        release: None,
    })
}

/// Sets a target for so many milliseconds.
pub(super) fn lease(directory: &Path, bytes: u64, milliseconds: u64) {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    let request = Request::Set {
        bytes,
        expected: None,
        lease: Some(milliseconds),
        fallback: None,
        owner: None,
        release: None,
    };
    client.call(&request).unwrap();
}

#[test]
fn a_client_does_not_overwrite_what_another_one_has_set() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    replace(directory, 0, 8 << 12).unwrap();
    let error = replace(directory, 0, 9 << 12).unwrap_err();
    let ClientError::Refused(ControlError { kind, target, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!((kind, target), (ErrorKind::Conflict, Some(8 << 12)));
    assert_eq!(info(directory).target, 8 << 12);
    // Each of the clients sets a target that is larger by a page, and again if another one was faster.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let mut last = 8 << 12;
                    while let Err(error) = replace(directory, last, last + (1 << 12)) {
                        let ClientError::Refused(error) = error else {
                            panic!("{error}");
                        };
                        last = error.target.unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(info(directory).target, (8 + 4 * 20) << 12);
    daemon.end();
}

#[test]
fn a_lease_ends_in_time_also_without_a_vmm() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut events = subscribe(directory);
    set(directory, 4 << 12);
    lease(directory, 8 << 12, 60_000);
    wait_for_state("the lease", &mut events, |info| info.lease.is_some());
    let state = info(directory);
    let now = state.lease.unwrap();
    assert!(now.remaining <= 60_000 && now.fallback == 4 << 12);
    assert_eq!((state.target, state.lapsed), (8 << 12, false));

    // The client renews it for the last time.
    let start = Instant::now();
    lease(directory, 8 << 12, 500);
    wait_for_state("the end", &mut events, |info| info.lapsed);
    assert!(start.elapsed() >= Duration::from_millis(500));
    let state = info(directory);
    assert_eq!((state.target, state.lease), (4 << 12, None));
    wait_for_line(
        directory,
        "the lease on the target of 32768 bytes has run out; the target is 16384 bytes now",
    );
    set(directory, 4 << 12);
    assert!(!info(directory).lapsed);
    daemon.end();
}

#[test]
fn a_guest_gets_the_target_after_the_lease() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    // The change before there was a driver.
    vmm.change();
    lease(directory, 8 << 12, 60_000);
    vmm.change();
    assert_eq!(vmm.config()[..4], 8_u32.to_le_bytes());
    lease(directory, 8 << 12, 100);
    vmm.change();
    assert_eq!(vmm.config()[..4], [0; 4]);
    daemon.end();
}

#[test]
fn a_lease_outlives_a_worker_and_ends_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    for milliseconds in [600_000, 1000] {
        lease(directory, 8 << 12, milliseconds);
        let worker = daemon.worker();
        kill(worker, Signal::SIGKILL).unwrap();
        daemon.wait_for_another(worker);
        let is_kept = |info: &Info| {
            let is_kept = |lease: &Lease| lease.remaining <= milliseconds && lease.fallback == 0;
            info.target == 8 << 12 && info.lease.as_ref().is_some_and(is_kept)
        };
        let is_over = |info: &Info| info.target == 0 && info.lapsed && info.lease.is_none();
        match milliseconds {
            1000 => wait_for_info("the end", directory, is_over),
            _ => wait_for_info("the lease", directory, is_kept),
        }
    }
    daemon.end();
}
