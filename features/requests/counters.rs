// SPDX-License-Identifier: GPL-2.0

//! Counters of host requests, in debugfs.

#![forbid(unsafe_code)]

use crate::rust::{
    fs::debugfs,
    mm::zone::Scan, //
};

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The counters in debugfs.
#[pin_data]
pub(super) struct Counters {
    /// Memory in answers, in bytes.
    #[pin]
    pub(super) listed: debugfs::File<Atomic<u64>>,
    /// The part of it in memory blocks, in bytes.
    #[pin]
    pub(super) blocks: debugfs::File<Atomic<u64>>,
    /// The longest time for which a zone's lock was held, in nanoseconds.
    #[pin]
    pub(super) max_hold: debugfs::File<Atomic<u64>>,
    /// The most PFNs that were scanned under one hold.
    #[pin]
    pub(super) max_pfns: debugfs::File<Atomic<u64>>,
    /// The requests that are open.
    #[pin]
    pub(super) open: debugfs::File<Atomic<u64>>,
    /// Completed requests, and those of them that failed.
    #[pin]
    pub(super) completed: debugfs::File<Atomic<u64>>,
    #[pin]
    pub(super) refused: debugfs::File<Atomic<u64>>,
}

impl Counters {
    pub(super) fn new(dir: &debugfs::Dir) -> impl PinInit<Self> + use<'_> {
        pin_init!(Self {
            listed <- dir.file(c"unused_listed_bytes", Atomic::new(0)),
            blocks <- dir.file(c"unused_block_bytes", Atomic::new(0)),
            max_hold <- dir.file(c"unused_max_hold_ns", Atomic::new(0)),
            max_pfns <- dir.file(c"unused_max_pfns_per_hold", Atomic::new(0)),
            open <- dir.file(c"requests_open", Atomic::new(0)),
            completed <- dir.file(c"requests_completed", Atomic::new(0)),
            refused <- dir.file(c"requests_refused", Atomic::new(0)),
        })
    }

    pub(super) fn record_scan(&self, scan: Scan) {
        let time = u64::try_from(scan.time.as_nanos()).unwrap_or(0);

        // There is one task.
        self.max_hold
            .store(self.max_hold.load(Relaxed).max(time), Relaxed);
        self.max_pfns
            .store(self.max_pfns.load(Relaxed).max(scan.pfns as u64), Relaxed);
    }
}
