// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is pinned, as for a device. Unit tests have this file, too.

use std::fs::{self, File};
use std::process::Child;

use io_uring::IoUring;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// A page of a file that is pinned until this is dropped: by the fixed buffer of an io_uring.
pub(crate) struct Pinned {
    _ring: IoUring,
    page: MmapRegion,
}

impl Pinned {
    pub(crate) fn new(file: &File, offset: u64) -> Self {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        let page: MmapRegion = MmapRegion::from_file(file, 4096).unwrap();
        let ring = IoUring::new(4).unwrap();
        let buffer = libc::iovec {
            iov_base: page.as_ptr().cast(),
            iov_len: page.size(),
        };
        // SAFETY: The page stays mapped while the ring exists: the ring is dropped before it.
        #[expect(unsafe_code, reason = "the kernel is given an address")]
        let registered = unsafe { ring.submitter().register_buffers(&[buffer]) };
        registered.unwrap();
        Self { _ring: ring, page }
    }

    /// The first byte of the page.
    pub(crate) fn byte(&self) -> u8 {
        self.page.as_volatile_slice().read_obj(0).unwrap()
    }
}

/// Whether a process has pinned memory. The kernel does not count what a process with `CAP_IPC_LOCK` has pinned.
pub(crate) fn has_pinned(process: &Child) -> bool {
    let files = fs::read_dir(format!("/proc/{}/fdinfo", process.id())).unwrap();
    files
        .filter_map(|file| fs::read_to_string(file.unwrap().path()).ok())
        .any(|file| file.lines().any(|line| line == "UserBufs:\t1"))
}
