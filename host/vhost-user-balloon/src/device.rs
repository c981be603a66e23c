// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: what the front end and the guest see of it.
//!
//! One thread serves all queues, each for a bounded number of messages before the next one has its turn.
//! Other threads set it up and control it. [`sync`](crate::sync) has the order of the locks.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Once, PoisonError};
use std::time::{Duration, Instant};

use log::debug;
use vhost_user_backend::VringEpollHandler;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::channel::Channel;
use crate::config::Fields;
use crate::counters::Counters;
use crate::discard::Granularity;
use crate::features::Feature;
use crate::floor::Floor;
use crate::hazard::{Hazard, Identity, Watch};
use crate::hinting::Hints;
use crate::kind::MAX_QUEUES;
use crate::requests::Requests;
use crate::state::State;
use crate::stats::Stats;
use crate::sync::{Level, Mutex, lock};
use crate::timer::Timer;
use crate::work::Work;

mod backend;
mod commands;
mod hazards;
mod queues;
mod statistics;
mod sweep;
mod target;

/// What no file descriptor is.
const NO_FD: RawFd = -1;

/// The guest has not read a target yet. No balloon has so many pages.
const NOT_ASKED: u32 = u32::MAX;

/// What wakes the worker besides the queues. The numbers up to that of the queues are the library's.
const WAKE: u64 = MAX_QUEUES as u64 + 1;
const TIMER: u64 = MAX_QUEUES as u64 + 2;
const RETRY: u64 = MAX_QUEUES as u64 + 3;
const GRACE: u64 = MAX_QUEUES as u64 + 4;
const SWEEP: u64 = MAX_QUEUES as u64 + 5;

/// How long an access to the configuration space waits until it is known whether the driver is a new one. The test
/// must not depend on how busy the machine is.
const KNOWN_TIME: Duration = Duration::from_millis(if cfg!(test) { 1000 } else { 20 });

/// How a device is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The feature bits that it offers.
    pub features: u64,
    /// The granule of shared memory.
    pub granularity: Granularity,
    /// Whether a page that comes out of the balloon has memory at once.
    pub prefault: bool,
    /// What memory is discarded in spite of.
    pub allowed: Vec<Hazard>,
    /// The name of the VM, if it has one.
    pub name: Option<String>,
    /// What is left to the guest at least.
    pub floor: Floor,
    /// For how long a guest that boots is left alone by a target that was there before.
    pub boot_grace: Duration,
}

/// What the front end has said about the guest's memory.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// How much there is, in bytes.
    pub memory: u64,
    /// The largest granule in bytes.
    pub granule: Option<u64>,
    /// The files that hold it.
    pub files: BTreeSet<Identity>,
    /// Why some of it must not be discarded.
    pub hazards: BTreeSet<Hazard>,
}

/// When something happened, or will.
#[derive(Debug, Default)]
struct Times {
    /// When the guest did something for the last time.
    answered: Option<Instant>,
    /// When a guest has been left alone for long enough.
    grace_end: Option<Instant>,
    /// When a driver was taken up.
    started: Option<Instant>,
    /// When the target that the guest reads or the balloon's size changed.
    moved: Option<Instant>,
}

/// A balloon device.
#[derive(Debug)]
pub struct Device {
    settings: Settings,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    acked: AtomicU64,
    work: Mutex<Work>,
    /// What is in the balloon, for another process.
    kept: Option<File>,
    state: Mutex<State>,
    hints: Mutex<Hints>,
    stats: Mutex<Stats>,
    sampled: Condvar,
    requests: Mutex<Requests>,
    /// Where the host's wishes are kept. Locked while they are written: the guest waits for the state, and
    /// must not wait for a disk.
    file: Mutex<Option<PathBuf>>,
    /// To the front end.
    channel: Channel,
    /// What is counted.
    pub counters: Counters,
    connected: AtomicBool,
    /// Whether a driver's queues are served.
    running: AtomicBool,
    /// Whether a driver has accepted features, and it is not known yet whether it is a new one.
    unknown: Mutex<bool>,
    known: Condvar,
    /// Whether the configuration space has changed while there was nobody to tell.
    config_changed: AtomicBool,
    /// A bit for each queue that is to be served without the guest having asked for it.
    pending: AtomicU64,
    wake: EventFd,
    timer: Timer,
    /// Goes off when the deflate queue is to be served again.
    retry: Timer,
    /// Goes off when a guest has been left alone for long enough.
    grace: Timer,
    /// Goes off when the next part of the balloon is searched.
    sweep: Timer,
    times: Mutex<Times>,
    /// The target that the guest has read last, in balloon pages, or [`NOT_ASKED`].
    asked: AtomicU32,
    /// The target that the guest was notified of last, in balloon pages.
    told: AtomicU32,
    /// How many times the guest is still asked for statistics soon.
    soon: AtomicU32,
    /// Whether the deflate queue waits for memory of the host's.
    blocked: AtomicBool,
    /// Done when it was logged that granules are large.
    large_granules: Once,
    sizes: Mutex<Sizes>,
    /// What is known about the processes that have the guest's memory. Locked while they are looked at.
    watch: Mutex<Watch>,
    /// The file descriptor that ends the worker, or [`NO_FD`].
    exit: AtomicI32,
}

impl Device {
    /// A device that begins in this state, and keeps the host's part of it at `path`, and what is in the balloon
    /// in the file `kept`.
    ///
    /// # Errors
    ///
    /// The system has no file descriptors.
    pub fn new(
        settings: Settings,
        state: State,
        path: Option<PathBuf>,
        channel: Channel,
        kept: Option<File>,
    ) -> io::Result<Self> {
        let interval = state.stats_interval;
        let device = Self {
            work: Mutex::new(Level::Work, Work::new(&settings.allowed, kept.as_ref())),
            kept,
            settings,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::default()),
            acked: AtomicU64::new(0),
            state: Mutex::new(Level::Short, state),
            hints: Mutex::default(),
            stats: Mutex::default(),
            sampled: Condvar::new(),
            requests: Mutex::default(),
            file: Mutex::new(Level::Slow, path),
            channel,
            counters: Counters::default(),
            connected: AtomicBool::new(false),
            running: AtomicBool::new(false),
            unknown: Mutex::default(),
            known: Condvar::new(),
            // A guest that went on without the device may have missed a change.
            config_changed: AtomicBool::new(true),
            pending: AtomicU64::new(0),
            wake: EventFd::new(EFD_NONBLOCK)?,
            timer: Timer::new()?,
            retry: Timer::new()?,
            grace: Timer::new()?,
            sweep: Timer::new()?,
            times: Mutex::default(),
            asked: AtomicU32::new(NOT_ASKED),
            told: AtomicU32::new(0),
            soon: AtomicU32::new(0),
            blocked: AtomicBool::new(false),
            large_granules: Once::new(),
            sizes: Mutex::default(),
            watch: Mutex::new(Level::Slow, Watch::default()),
            exit: AtomicI32::new(NO_FD),
        };
        device.arm(interval)?;
        Ok(device)
    }

    /// The memory that the library is to keep up to date.
    pub fn memory(&self) -> GuestMemoryAtomic<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// Prepares for another front end, which `worker` is to serve the queues of.
    ///
    /// # Errors
    ///
    /// The system cannot wait for the device's own events.
    pub fn connect(&self, worker: &VringEpollHandler<Arc<Self>>) -> io::Result<()> {
        let events = [
            (self.wake.as_raw_fd(), WAKE),
            (self.timer.as_raw_fd(), TIMER),
            (self.grace.as_raw_fd(), GRACE),
            (self.retry.as_raw_fd(), RETRY),
            (self.sweep.as_raw_fd(), SWEEP),
        ];
        for (event, number) in events {
            worker.register_listener(event, EventSet::IN, number)?;
        }
        self.connected.store(true, SeqCst);
        debug!("a front end is connected");
        Ok(())
    }

    /// Takes note that the front end is gone, and its worker ended.
    pub fn disconnect(&self) {
        self.stop();
        // The VM may be gone for good, so its memory must not be kept. One that comes back begins with an
        // empty bitmap, and half a granule is not given back then.
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(GuestMemoryMmap::default());
        *lock(&self.work) = Work::new(&self.settings.allowed, self.kept.as_ref());
        *lock(&self.watch) = Watch::default();
        *lock(&self.sizes) = Default::default();
        *lock(&self.times) = Times::default();
        self.asked.store(NOT_ASKED, SeqCst);
        if self.soon.swap(0, SeqCst) > 0 {
            self.arm_ordinary();
        }
        self.blocked.store(false, SeqCst);
        self.acked.store(0, SeqCst);
        // What the guest has said was about itself.
        let mut state = lock(&self.state);
        state.config = Fields {
            target: state.config.target,
            ..Fields::default()
        };
        drop(state);
        self.connected.store(false, SeqCst);
        lock(&self.stats).forget();
        self.sampled.notify_all();
        lock(&self.requests).disconnect(&self.counters);
        // The library forgets this file descriptor without closing it.
        let exit = self.exit.swap(NO_FD, SeqCst);
        if exit != NO_FD {
            let _ = nix::unistd::close(exit);
        }
        debug!("the front end is gone");
    }

    fn stop(&self) {
        lock(&self.work).at_work = false;
        self.running.store(false, SeqCst);
        self.set_unknown(false);
        // A driver that continues may have been left alone meanwhile.
        self.config_changed.store(true, SeqCst);
    }

    fn set_unknown(&self, unknown: bool) {
        *lock(&self.unknown) = unknown;
        self.known.notify_all();
    }

    /// Waits until it is known whether the driver is a new one, if it has just accepted features. A new one must not
    /// read the target of the one before it, and what it writes must not be taken for that one's.
    fn wait_known(&self) {
        let unknown = lock(&self.unknown);
        let mut unknown = unknown.wait_while(&self.known, KNOWN_TIME, |unknown| *unknown);
        // A front end may accept features long before there are queues.
        *unknown = false;
    }

    /// Whether a VMM is connected.
    pub fn connected(&self) -> bool {
        self.connected.load(SeqCst)
    }

    /// Whether a driver's queues are served.
    pub fn running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// The features that were negotiated, or none without a driver.
    pub fn features_at_work(&self) -> u64 {
        if self.running() {
            self.acked.load(SeqCst)
        } else {
            0
        }
    }

    /// Whether the guest's driver relies on what its free pages hold, and that is not what holes have: zeroes.
    pub fn keeps_free_pages(&self) -> bool {
        let poison = lock(&self.state).config.poison_val;
        Feature::PagePoison.is_in(self.acked.load(SeqCst)) && poison != 0
    }

    /// When the guest did something for the last time.
    pub fn answered(&self) -> Option<Instant> {
        lock(&self.times).answered
    }

    /// The state that is kept.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// The name of the VM, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.settings.name.as_deref()
    }

    /// What the front end has said about the guest's memory.
    pub fn sizes(&self) -> Sizes {
        lock(&self.sizes).clone()
    }

    /// Writes what the host wants to the file. It may have to wait for a disk, so this comes last. One thread at a time
    /// writes the state as it is then, so the file has the last wish in the end.
    fn save(&self) -> io::Result<()> {
        let file = lock(&self.file);
        file.as_ref().map_or(Ok(()), |path| self.state().save(path))
    }
}

#[cfg(test)]
mod tests;
