// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Targets of several clients.

use balloon_control::ControlError;

use super::*;

/// Sets a target if another one is in force.
fn replace(directory: &Path, expected: u64, bytes: u64) -> Result<Answer, ClientError> {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    let expected = Some(expected);
    client.call(&Request::Set { bytes, expected })
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
