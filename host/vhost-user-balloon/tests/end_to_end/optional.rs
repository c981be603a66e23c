// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front ends that use optional parts of the protocol: those that are not offered, and memory in several regions.

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::supervision::{log, start_logged, wait_for_line};
use super::*;

/// A message with this body, which requests an answer if `flags` has 8.
fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&[request, flags, size].map(u32::to_ne_bytes).concat(), body].concat()
}

/// A front end of which this has the socket, too.
fn connect(directory: &Path) -> (Vmm, UnixStream) {
    let vmm = inflated(directory);
    let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let socket = pidfd_getfd(process, vmm.front.as_raw_fd(), PidfdGetfdFlags::empty());
    (vmm, socket.unwrap().into())
}

#[test]
fn parts_that_are_not_offered_are_refused_and_the_balloon_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let (mut vmm, mut socket) = connect(directory);
    let zeros = [0; 24];
    // The request, how long its body is, its name, and the words of its answer.
    let rows: [(u32, usize, &str, Option<&[u64]>); 9] = [
        (6, 16, "SET_LOG_BASE", None),
        (7, 0, "SET_LOG_FD", None),
        (28, 0, "POSTCOPY_ADVISE", Some(&[])),
        (29, 0, "POSTCOPY_LISTEN", None),
        (30, 0, "POSTCOPY_END", Some(&[1])),
        (31, 24, "GET_INFLIGHT_FD", Some(&[0; 3])),
        (32, 24, "SET_INFLIGHT_FD", None),
        (42, 8, "SET_DEVICE_STATE_FD", Some(&[0x101])),
        (43, 0, "CHECK_DEVICE_STATE", Some(&[1])),
    ];
    for (pfn, (request, size, name, answer)) in (0x101..).zip(rows) {
        // Before REPLY_ACK is negotiated, the flag means nothing.
        for flags in [1, 9] {
            socket
                .write_all(&message(request, flags, &zeros[..size]))
                .unwrap();
            if let Some(words) = answer {
                let body: Vec<_> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                let expected = message(request, 5, &body);
                let mut answer = vec![0; expected.len()];
                socket.read_exact(&mut answer).unwrap();
                assert_eq!(answer, expected, "{name}");
            }
        }
        wait_for_line(directory, &format!("refusing {name} from the VMM"));
        assert_eq!(log(directory).matches(name).count(), 1, "{name}");
        vmm.inflate(pfn);
        assert_eq!(vmm.byte(u64::from(pfn) << 12), 0, "{name}");
        assert_eq!(vmm.config().len(), 16, "{name}");
    }
    assert!(info(directory).counters.refused.is_empty());
    drop((vmm, socket));
    daemon.end();
}

#[test]
fn memory_may_come_in_several_regions() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    let second = File::from(memfd_create("second", MFdFlags::empty()).unwrap());
    second
        .write_all_at(&vec![1; usize::try_from(MEMORY).unwrap()], 0)
        .unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 2 * MEMORY,
        memory_size: MEMORY,
        userspace_addr: BASE + 2 * MEMORY,
        mmap_offset: 0,
        mmap_handle: second.as_raw_fd(),
    };
    let page = |place: u64| {
        let mut byte = [0];
        second.read_exact_at(&mut byte, place).unwrap();
        byte[0]
    };
    let pfn = u32::try_from((2 * MEMORY) >> 12).unwrap();
    vmm.front.add_mem_region(&region).unwrap();
    wait_for("the region", || info(directory).memory == Some(2 * MEMORY));
    vmm.inflate(pfn + 1);
    assert_eq!(
        [0, 1, 2].map(|page_number| page(page_number << 12)),
        [1, 0, 1]
    );
    // The first region is still there.
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    vmm.front.remove_mem_region(&region).unwrap();
    wait_for("its removal", || info(directory).memory == Some(MEMORY));
    vmm.inflate(pfn + 2);
    assert_eq!(page(2 << 12), 1);
    assert_eq!(info(directory).counters.refused["outside-memory"], 1);
    daemon.end();
}
