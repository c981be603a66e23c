// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device of the front end and the guest.
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

use balloon_control::Changes;
use log::debug;
use vhost_user_backend::VringEpollHandler;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::counters::Counters;
use crate::memory::discard::Granularity;
use crate::memory::hazard::{Hazard, Identity, Watch};
use crate::queues::hinting::Hints;
use crate::queues::requests::Requests;
use crate::queues::stats::Stats;
use crate::sync::{Level, Mutex, lock, order};
use crate::vhost_user::channel::Channel;
use crate::virtio::config::Fields;
use crate::virtio::features::Feature;
use crate::virtio::kind::MAX_QUEUES;
use floor::Floor;
use state::State;
use timer::Timer;
use work::Work;

mod backend;
mod commands;
pub mod floor;
mod hazards;
pub mod lease;
mod notify;
mod queues;
mod resident;
pub mod state;
mod statistics;
mod sweep;
pub mod target;
pub mod term;
mod timer;
mod work;

/// The value for no file descriptor.
const NO_FD: RawFd = -1;

/// The guest has not read a target yet. No balloon has so many pages.
const NOT_ASKED: u32 = u32::MAX;

/// Events of the worker thread besides the queues. The library uses the numbers up to that of the
/// queues.
const WAKE: u64 = MAX_QUEUES as u64 + 1;
const TIMER: u64 = MAX_QUEUES as u64 + 2;
const RETRY: u64 = MAX_QUEUES as u64 + 3;
const GRACE: u64 = MAX_QUEUES as u64 + 4;
const SWEEP: u64 = MAX_QUEUES as u64 + 5;
const NOTICE: u64 = MAX_QUEUES as u64 + 6;

/// How long an access to the configuration space waits until it is known whether the driver is a new one. In tests
/// it is long, since they must not depend on the load of the machine.
const KNOWN_TIME: Duration = Duration::from_millis(if cfg!(test) { 1000 } else { 20 });

/// The settings of a device.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The feature bits that it offers.
    pub features: u64,
    /// The granule of shared memory.
    pub granularity: Granularity,
    /// Whether to prefault deflated pages.
    pub prefault: bool,
    /// The hazards to ignore.
    pub allowed: Vec<Hazard>,
    /// The name of the VM, if it has one.
    pub name: Option<String>,
    /// The daemon's floor.
    pub floor: Floor,
    /// The boot grace: how long an earlier target is not requested from a guest that boots.
    pub boot_grace: Duration,
}

/// The properties of the guest's memory.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// The size in bytes.
    pub memory: u64,
    /// The largest granule in bytes.
    pub granule: Option<u64>,
    /// The files that hold it.
    pub files: BTreeSet<Identity>,
    /// Why some of it must not be discarded.
    pub hazards: BTreeSet<Hazard>,
}

/// Times of events.
#[derive(Debug, Default)]
struct Times {
    /// When the guest last used a queue.
    answered: Option<Instant>,
    /// The end of the boot grace.
    grace_end: Option<Instant>,
    /// When the current driver started.
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
    /// The balloon's state in a file, for the next worker.
    kept: Option<File>,
    state: Mutex<State>,
    /// Notified when a lease begins or ends.
    leased: Condvar,
    hints: Mutex<Hints>,
    stats: Mutex<Stats>,
    sampled: Condvar,
    requests: Mutex<Requests>,
    /// The state file. It has a lock of its own, since the guest waits for the state's lock, and must not
    /// wait for a disk.
    file: Mutex<Option<PathBuf>>,
    /// The channel to the front end.
    channel: Channel,
    /// The counters.
    pub counters: Counters,
    /// What has changed, for subscribers of the control socket.
    pub(crate) changes: Changes,
    connected: AtomicBool,
    /// Whether a driver's queues are served.
    running: AtomicBool,
    /// Whether a driver has accepted features, and may be a new one.
    unknown: Mutex<bool>,
    known: Condvar,
    /// Whether the configuration space has changed since the guest was notified.
    config_changed: AtomicBool,
    /// Whether the guest was notified a moment ago.
    notified: AtomicBool,
    /// A bit for each queue to serve without a notification.
    pending: AtomicU64,
    wake: EventFd,
    timer: Timer,
    /// Expires when the deflate queue must be served again.
    retry: Timer,
    /// Expires at the end of the boot grace, and of the time for the first statistics.
    grace: Timer,
    /// Expires when the next part of the balloon must be searched.
    sweep: Timer,
    /// Expires when the guest may be notified again.
    notice: Timer,
    times: Mutex<Times>,
    /// The target that the guest has read last, in balloon pages, or [`NOT_ASKED`].
    asked: AtomicU32,
    /// The target that the guest was notified of last, in balloon pages.
    told: AtomicU32,
    /// The memory in the balloon by the guest's messages, in bytes.
    held: AtomicU64,
    /// The remaining number of early statistics requests.
    soon: AtomicU32,
    /// The shortest interval of statistics that a subscriber wants, in milliseconds. 0 is none.
    wished: AtomicU64,
    /// Whether the deflate queue waits for memory of the host.
    blocked: AtomicBool,
    /// Completed when the large granules were logged.
    large_granules: Once,
    /// How many drivers have started.
    starts: AtomicU32,
    sizes: Mutex<Sizes>,
    /// The state of the processes that use the guest's memory. Locked while it is read.
    watch: Mutex<Watch>,
    /// The file descriptor that ends the worker, or [`NO_FD`].
    exit: AtomicI32,
}

impl Device {
    /// A device that begins in this state. It stores the host's part of the state at `path`, and the balloon's
    /// state in the file `kept`.
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
            leased: Condvar::new(),
            hints: Mutex::default(),
            stats: Mutex::default(),
            sampled: Condvar::new(),
            requests: Mutex::default(),
            file: Mutex::new(Level::Slow, path),
            channel,
            counters: Counters::default(),
            changes: Changes::default(),
            connected: AtomicBool::new(false),
            running: AtomicBool::new(false),
            unknown: Mutex::default(),
            known: Condvar::new(),
            // A guest that continued without the device may have missed a change.
            config_changed: AtomicBool::new(true),
            notified: AtomicBool::new(false),
            pending: AtomicU64::new(0),
            wake: EventFd::new(EFD_NONBLOCK)?,
            timer: Timer::new()?,
            retry: Timer::new()?,
            grace: Timer::new()?,
            sweep: Timer::new()?,
            notice: Timer::new()?,
            times: Mutex::default(),
            asked: AtomicU32::new(NOT_ASKED),
            told: AtomicU32::new(0),
            held: AtomicU64::new(0),
            soon: AtomicU32::new(0),
            wished: AtomicU64::new(0),
            blocked: AtomicBool::new(false),
            large_granules: Once::new(),
            starts: AtomicU32::new(0),
            sizes: Mutex::default(),
            watch: Mutex::new(Level::Slow, Watch::default()),
            exit: AtomicI32::new(NO_FD),
        };
        device.arm(interval)?;
        Ok(device)
    }

    /// The memory map, which the library updates.
    pub fn memory(&self) -> GuestMemoryAtomic<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// Prepares for another front end, whose queues `worker` will serve.
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
            (self.notice.as_raw_fd(), NOTICE),
        ];
        for (event, number) in events {
            worker.register_listener(event, EventSet::IN, number)?;
        }
        self.connected.store(true, SeqCst);
        self.publish(Changes::info);
        debug!("a front end is connected");
        Ok(())
    }

    /// Handles the end of the front end and of its worker thread.
    pub fn disconnect(&self) {
        self.stop();
        // The VM may have ended, so its memory must be released. A VM that reconnects starts with an
        // empty bitmap, and an incomplete granule is then not returned.
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(GuestMemoryMmap::default());
        *lock(&self.work) = Work::new(&self.settings.allowed, self.kept.as_ref());
        *lock(&self.watch) = Watch::default();
        self.held.store(0, SeqCst);
        *lock(&self.sizes) = Default::default();
        *lock(&self.times) = Times::default();
        self.asked.store(NOT_ASKED, SeqCst);
        if self.soon.swap(0, SeqCst) > 0 {
            self.arm_ordinary();
        }
        self.blocked.store(false, SeqCst);
        self.acked.store(0, SeqCst);
        // The guest's values belong to that guest only.
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
        lock(&self.hints).disconnect();
        // The library forgets this file descriptor without closing it.
        let exit = self.exit.swap(NO_FD, SeqCst);
        if exit != NO_FD {
            let _ = nix::unistd::close(exit);
        }
        self.publish(Changes::info);
        debug!("the front end is gone");
    }

    /// Publishes a change for subscribers of the control socket. This takes a lock of the last level.
    fn publish(&self, change: fn(&Changes)) {
        let _order = order(Level::Short);
        change(&self.changes);
    }

    /// Changes the driver's fields, and publishes what has changed.
    fn change_fields(&self, change: impl FnOnce(&mut Fields)) {
        let mut state = lock(&self.state);
        let (size, shortfall) = (state.config.actual, state.config.shortfall());
        change(&mut state.config);
        let has_moved = state.config.actual != size;
        let has_changed = has_moved || state.config.shortfall() != shortfall;
        drop(state);
        if has_moved {
            lock(&self.times).moved = Some(Instant::now());
        }
        if has_changed {
            self.publish(Changes::info);
        }
    }

    fn stop(&self) {
        // A driver that is reset before this worker has started it does not continue.
        self.channel.started();
        lock(&self.work).at_work = false;
        self.running.store(false, SeqCst);
        self.set_unknown(false);
        // A driver that continues may have a boot grace that has ended meanwhile.
        self.config_changed.store(true, SeqCst);
        self.publish(Changes::info);
    }

    fn set_unknown(&self, unknown: bool) {
        *lock(&self.unknown) = unknown;
        self.known.notify_all();
    }

    /// Waits until the device knows whether the driver is a new one, if it has just accepted features. A new driver
    /// must not read the target of the previous one, and its writes must not count as those of the previous one.
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

    /// Whether the guest's driver relies on the content of its free pages, and that is not zero, as
    /// in holes.
    pub fn keeps_free_pages(&self) -> bool {
        let poison = lock(&self.state).config.poison_val;
        Feature::PagePoison.is_in(self.acked.load(SeqCst)) && poison != 0
    }

    /// When the guest last used a queue.
    pub fn answered(&self) -> Option<Instant> {
        lock(&self.times).answered
    }

    /// The stored state.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// The name of the VM, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.settings.name.as_deref()
    }

    /// The process of the connected front end, if that is known.
    pub fn vmm(&self) -> Option<i32> {
        self.channel.vmm().filter(|_| self.connected())
    }

    /// The memory in the balloon by the guest's messages, in bytes.
    pub fn held(&self) -> u64 {
        self.held.load(SeqCst)
    }

    /// The properties of the guest's memory.
    pub fn sizes(&self) -> Sizes {
        lock(&self.sizes).clone()
    }

    /// Writes the host's settings to the file. This comes last, since it may wait for a disk. One thread at a time
    /// writes the current state, so the file has the newest settings in the end.
    fn save(&self) -> io::Result<()> {
        let file = lock(&self.file);
        file.as_ref().map_or(Ok(()), |path| self.state().save(path))
    }
}

#[cfg(test)]
mod tests;
