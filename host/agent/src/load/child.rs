// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A load's own process: reports to the parent, and stops at the parent's request.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use agent::Progress;
use anyhow::Result;

pub(super) const MIB: usize = 1 << 20;
pub(super) const PAGE_SIZE: usize = 4096;

/// Reports the load's progress to the parent.
pub(super) fn report(mib: usize, passes: u64) -> Result<()> {
    say(&Progress {
        mib,
        passes,
        stall_us: 0,
    })
}

/// The same, with all fields.
pub(super) fn say(progress: &Progress) -> Result<()> {
    println!("{}", serde_json::to_string(progress)?);
    Ok(())
}

/// Runs several threads that count passes, until they end, and reports the number of passes.
pub(super) fn in_threads(
    mib: usize,
    threads: usize,
    stop: Stop,
    work: impl Fn(&AtomicU64) + Sync,
) -> Result<()> {
    let passes = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work(&passes));
        }
        while !stop.is_asked() {
            report(mib, passes.load(Ordering::Relaxed))?;
            thread::sleep(Duration::from_millis(20));
        }
        report(mib, passes.load(Ordering::Relaxed))
    })
}

/// Writes to every page, so that the kernel provides it.
pub(super) fn touch_pages(memory: &mut [u8]) {
    for page in memory.chunks_mut(PAGE_SIZE) {
        page[0] = 1;
    }
}

/// Whether the parent has requested the end of the load.
#[derive(Clone, Copy)]
pub(super) struct Stop(&'static AtomicBool);

impl Stop {
    pub(super) fn when_stdin_closes() -> Self {
        static STOP: AtomicBool = AtomicBool::new(false);
        let stop = Self(&STOP);
        thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            stop.ask();
        });
        stop
    }

    pub(super) fn ask(self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_asked(self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn wait(self) {
        while !self.is_asked() {
            thread::sleep(Duration::from_millis(20));
        }
    }
}
