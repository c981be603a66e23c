// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: what the front end and the guest see of it.
//!
//! One thread serves all queues, each for a bounded number of messages before the next one has its turn.
//! Other threads set it up and control it. Of several locks they are taken in this order: the queue, the
//! worker's data, then one of the others; the state comes after its file.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::request::Command;
use log::{debug, error, info, warn};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::balloon::Balloon;
use crate::channel::Channel;
use crate::config::{Fields, bytes};
use crate::counters::Counters;
use crate::deflate::Deflate;
use crate::discard::{Discarder, Granularity, Pieces};
use crate::features::{Feature, config_size, tells_before_use};
use crate::floor::Floor;
use crate::hazard::{Hazard, Identity, Watch};
use crate::hinting::{Hinting, Hints};
use crate::inflate::Inflate;
use crate::kept;
use crate::page_map::PageMap;
use crate::pages::{Format, Pages};
use crate::queue::{BUDGET, Budget, Kind, MAX_QUEUE_SIZE, MAX_QUEUES, Next, Unfinished, serve};
use crate::reporting::Reporting;
use crate::requests::{Answers, Requests, TooMany};
use crate::state::{State, since_boot};
use crate::stats::Stats;

/// What wakes the worker besides the queues. The numbers up to that of the queues are the library's.
const WAKE: u64 = MAX_QUEUES as u64 + 1;
const TIMER: u64 = MAX_QUEUES as u64 + 2;
const RETRY: u64 = MAX_QUEUES as u64 + 3;
const GRACE: u64 = MAX_QUEUES as u64 + 4;

/// How long the guest waits for memory that the host does not have, before the host is asked again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// How often a guest is asked for statistics after its VMM has changed its memory, and how many times.
const SOON: Duration = Duration::from_secs(1);
const SOON_TIMES: u32 = 10;

/// A balloon that has not moved for so long is at rest: a driver tells its size once a second on the way.
const REST: Duration = Duration::from_secs(2);

/// How long a driver has to send its first statistics. Until then it keeps the balloon that it has: the guest may have
/// much less memory than the VMM has shared.
const REPORT_TIME: Duration = Duration::from_secs(5);

/// How long an access to the configuration space waits until it is known whether the driver is a new one. The test
/// must not depend on how busy the machine is.
const KNOWN_TIME: Duration = Duration::from_millis(if cfg!(test) { 1000 } else { 20 });

/// For how long nothing is locked when the thread has been at work for as long as a queue has. Else it would mostly
/// have the locks again before another one that waits for them is awake.
const PAUSE: Duration = Duration::from_millis(1);

/// The smallest part of the configuration space that is all of it to a driver, in bytes.
const SMALLEST_CONFIG: u32 = 8;

/// The largest page of a guest's kernel, in balloon pages.
const LARGEST_PAGE: u32 = 16;

/// The largest granule that the configuration space can tell, in bytes.
const LARGEST_GRANULE: u32 = 1 << 31;

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

/// What the thread that serves the queues needs, and only it as long as a driver is at work.
#[derive(Debug, Default)]
struct Work {
    memory: Arc<GuestMemoryMmap>,
    balloon: Balloon,
    discarder: Discarder,
    pages: Pages,
    pieces: Pieces,
    ranges: Vec<Range<u64>>,
    heads: Vec<u16>,
    /// The batch of each kind of queue that was begun.
    unfinished: [Unfinished; MAX_QUEUES],
    /// For each kind of queue, whether it is served for the first time since a driver was taken up. Another
    /// process may have begun with its messages.
    taken_up: [bool; MAX_QUEUES],
    /// Where the inflate queue's available ring is to be read next.
    position: Option<u16>,
    /// Whether the inflate queue was served since it was started.
    at_work: bool,
    /// When the thread left time to others.
    paused: Option<Instant>,
}

impl Work {
    /// Without memory yet. Memory is discarded in spite of these hazards, and what is in the balloon is kept in a
    /// file.
    fn new(allowed: &[Hazard], kept: Option<&File>) -> Self {
        let mut balloon = Balloon::new(allowed);
        if let Some(kept) = kept {
            match kept.try_clone() {
                Ok(file) => balloon.keep(file),
                Err(error) => kept::give_up(kept, &error),
            }
        }
        Self {
            balloon,
            taken_up: [true; MAX_QUEUES],
            ..Self::default()
        }
    }

    /// Whether the inflate queue is a new driver's, when it is served for the first time since it was
    /// started.
    ///
    /// A guest that was reset, or whose driver was loaded anew, has an empty balloon, and there is no
    /// message for that. Pages of the driver before it would complete granules of which the guest uses the
    /// rest, and their contents would be lost. But a driver sets its rings up from index 0, and a front end
    /// that only stops a queue starts it where it was stopped. So an index that is not the one where this
    /// device stopped belongs to another driver. Index 0 does as well: it is that of an old driver only if
    /// that one has not inflated anything, or after a multiple of 65536 messages. Then the daemon asks for an
    /// empty balloon until the boot grace ends, and for the target after that. Nothing is lost before this
    /// question is asked: only the inflate queue punches what is in the balloon.
    fn is_new_driver(&self, next: u16) -> bool {
        next == 0 || self.position.is_some_and(|position| position != next)
    }
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
    answered: Mutex<Option<Instant>>,
    /// A bit for each queue that is to be served without the guest having asked for it.
    pending: AtomicU64,
    wake: EventFd,
    timer: TimerFd,
    /// Goes off when the deflate queue is to be served again.
    retry: TimerFd,
    /// Goes off when a guest has been left alone for long enough.
    grace: TimerFd,
    /// When that is.
    grace_end: Mutex<Option<Instant>>,
    /// When a driver was taken up.
    started: Mutex<Option<Instant>>,
    /// The target that the guest has read last, in balloon pages.
    asked: AtomicU32,
    /// The target that the guest was notified of last, in balloon pages.
    told: AtomicU32,
    /// When that or the balloon's size changed.
    moved: Mutex<Option<Instant>>,
    /// How many times the guest is still asked for statistics soon.
    soon: AtomicU32,
    /// Whether the deflate queue waits for memory of the host's.
    blocked: AtomicBool,
    /// Done when it was logged that granules are large.
    large_granules: Once,
    /// Done when it was logged that the configuration space is too small.
    short_config: Once,
    sizes: Mutex<Sizes>,
    /// What is known about the processes that have the guest's memory.
    watch: Mutex<Watch>,
    /// Why no memory is given back, as it was logged for the last time.
    logged: Mutex<BTreeSet<Hazard>>,
    /// The number of the file descriptor that ends the worker.
    exit: Mutex<Option<RawFd>>,
}

/// A thread that panics leaves nothing behind that is worse than what a guest can bring about.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        // The timer may be stopped between the event and the reading, which must not wait then.
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let device = Self {
            work: Mutex::new(Work::new(&settings.allowed, kept.as_ref())),
            kept,
            settings,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::default()),
            acked: AtomicU64::new(0),
            state: Mutex::new(state),
            hints: Mutex::default(),
            stats: Mutex::default(),
            sampled: Condvar::new(),
            requests: Mutex::default(),
            file: Mutex::new(path),
            channel,
            counters: Counters::default(),
            connected: AtomicBool::new(false),
            running: AtomicBool::new(false),
            unknown: Mutex::new(false),
            known: Condvar::new(),
            // A guest that went on without the device may have missed a change.
            config_changed: AtomicBool::new(true),
            answered: Mutex::default(),
            pending: AtomicU64::new(0),
            wake: EventFd::new(EFD_NONBLOCK)?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            retry: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            grace: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            grace_end: Mutex::default(),
            started: Mutex::default(),
            asked: AtomicU32::new(0),
            told: AtomicU32::new(0),
            moved: Mutex::default(),
            soon: AtomicU32::new(0),
            blocked: AtomicBool::new(false),
            large_granules: Once::new(),
            short_config: Once::new(),
            sizes: Mutex::default(),
            watch: Mutex::default(),
            logged: Mutex::default(),
            exit: Mutex::default(),
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
        let timer = self.timer.as_fd().as_raw_fd();
        worker.register_listener(self.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        worker.register_listener(timer, EventSet::IN, TIMER)?;
        let grace = self.grace.as_fd().as_raw_fd();
        worker.register_listener(grace, EventSet::IN, GRACE)?;
        let retry = self.retry.as_fd().as_raw_fd();
        worker.register_listener(retry, EventSet::IN, RETRY)?;
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
        lock(&self.logged).clear();
        *lock(&self.sizes) = Default::default();
        *lock(&self.answered) = None;
        *lock(&self.grace_end) = None;
        *lock(&self.started) = None;
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
        if let Some(exit) = lock(&self.exit).take() {
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
        let waited = self
            .known
            .wait_timeout_while(unknown, KNOWN_TIME, |unknown| *unknown);
        // A front end may accept features long before there are queues.
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
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
        *lock(&self.answered)
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

    /// Why no memory is given back to the host, apart from what a client has asked for.
    pub fn hazards(&self) -> BTreeSet<Hazard> {
        let Sizes { files, hazards, .. } = self.sizes();
        &self.process_hazards(&files) | &hazards
    }

    /// What processes with these files of the guest's memory do to it that forbids to discard any of it. It may take
    /// long to find out.
    fn process_hazards(&self, files: &BTreeSet<Identity>) -> BTreeSet<Hazard> {
        let mut hazards = lock(&self.watch).hazards(files, || self.channel.vmm());
        hazards.retain(|hazard| !self.settings.allowed.contains(hazard));
        self.log(&hazards | &self.sizes().hazards);
        hazards
    }

    fn log(&self, hazards: BTreeSet<Hazard>) {
        let mut logged = lock(&self.logged);
        for hazard in &hazards - &*logged {
            warn!(
                "memory is not given back to the host: {}; see --allow {hazard} for what to do",
                hazard.reason()
            );
        }
        if hazards.is_empty() && !logged.is_empty() {
            info!("memory is given back to the host again");
        }
        *logged = hazards;
    }

    /// For how long a client has had no memory given back to the host.
    pub fn inhibited(&self) -> Option<Duration> {
        lock(&self.state).inhibited(since_boot())
    }

    /// Has no memory given back to the host for so many seconds at least, or has it given back again. Another client
    /// may have asked for longer.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and this will be forgotten with the process.
    pub fn inhibit(&self, seconds: Option<u64>) -> io::Result<()> {
        {
            let mut state = lock(&self.state);
            match seconds {
                Some(seconds) => state.inhibit(since_boot(), Duration::from_secs(seconds)),
                None => state.inhibited = None,
            }
        }
        // What the worker is at may still be given back.
        drop(lock(&self.work));
        self.save()
    }

    /// The last sample of the guest's statistics.
    pub fn stats(&self) -> Option<balloon_control::Stats> {
        lock(&self.stats).answer()
    }

    /// Asks the guest for a new sample, and waits for it as long as there is a front end.
    pub fn fresh_stats(&self, timeout: Duration) -> Option<balloon_control::Stats> {
        let mut stats = lock(&self.stats);
        stats.want();
        let before = stats.sequence();
        let number = Kind::Stats.number(self.acked.load(SeqCst))?;
        self.wake(number);
        let (stats, _) = self
            .sampled
            .wait_timeout_while(stats, timeout, |stats| {
                self.connected() && stats.sequence() == before
            })
            .unwrap_or_else(PoisonError::into_inner);
        stats.answer().filter(|_| stats.sequence() != before)
    }

    /// Writes what the host wants to the file. It may have to wait for a disk, so this comes last. One thread at a time
    /// writes the state as it is then, so the file has the last wish in the end.
    fn save(&self) -> io::Result<()> {
        let file = lock(&self.file);
        file.as_ref().map_or(Ok(()), |path| self.state().save(path))
    }

    /// How much memory the guest has, in the balloon or not, in bytes: what it says in its statistics, or what the
    /// VMM has shared. A VMM shares more than there is for the guest: what a virtio-mem device has not plugged,
    /// NVDIMMs, memory of PCI devices.
    pub fn guest_memory(&self) -> Option<u64> {
        let shared = Some(lock(&self.sizes).memory).filter(|&bytes| bytes > 0)?;
        // Linux takes what is in the balloon off the total, if it does not take it back when it runs out of memory.
        let counts_balloon = Feature::DeflateOnOom.is_in(self.acked.load(SeqCst));
        let said = lock(&self.stats)
            .total()
            .map(|(total, size)| match counts_balloon {
                true => total,
                false => total.saturating_add(size),
            });
        Some(said.unwrap_or(shared).min(shared))
    }

    /// The largest balloon that leaves the guest its floor, in bytes.
    pub fn limit(&self) -> Option<u64> {
        self.settings.floor.limit(self.guest_memory()?)
    }

    /// For how long a guest that boots is still left alone.
    pub fn grace(&self) -> Option<Duration> {
        let end = (*lock(&self.grace_end))?;
        Some(end.saturating_duration_since(Instant::now())).filter(|rest| !rest.is_zero())
    }

    /// Whether the guest's driver is still to send its first statistics.
    fn is_unreported(&self) -> bool {
        let started = *lock(&self.started);
        let is_asked = lock(&self.state).stats_interval > 0;
        is_asked
            && Feature::Stats.is_in(self.features_at_work())
            && started.is_some_and(|started| started.elapsed() < REPORT_TIME)
            && lock(&self.stats).total().is_none()
    }

    /// Whether the balloon has the size that it is asked for, or has not moved for a while.
    fn is_at_rest(&self) -> bool {
        let actual = lock(&self.state).config.actual;
        // A guest rounds up to its own pages.
        let above = actual.checked_sub(self.asked.load(SeqCst));
        let moved = *lock(&self.moved);
        above.is_some_and(|pages| pages < LARGEST_PAGE)
            || moved.is_some_and(|moved| moved.elapsed() > REST)
    }

    /// How many balloon pages the guest is asked for now.
    fn asked(&self) -> u32 {
        // A driver that has not been seen yet may be that of a guest that boots.
        let unseen = !self.running() && !self.settings.boot_grace.is_zero();
        let alone = unseen || self.grace().is_some() || self.is_unreported();
        let limit = self
            .limit()
            .map_or(u64::MAX, |bytes| bytes / BALLOON_PAGE_SIZE);
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let config = &lock(&self.state).config;
        let target = config.target.min(limit);
        if alone {
            target.min(config.actual)
        } else {
            target
        }
    }

    /// Tells the guest if what it is asked for has changed without a client. A guest that has read it for another
    /// reason may not have noticed.
    fn follow(&self) {
        if self.told.load(SeqCst) != self.asked() {
            self.notify();
        }
    }

    /// Leaves a guest alone that boots under a target that was there before.
    fn leave_alone(&self) {
        let grace = self.settings.boot_grace;
        if grace.is_zero() || lock(&self.state).config.target == 0 {
            return;
        }
        // The timer goes off after this.
        let end = Instant::now().checked_add(grace);
        let after = Expiration::OneShot(TimeSpec::from_duration(grace));
        match self.grace.set(after, TimerSetTimeFlags::empty()) {
            Ok(()) => {
                info!(
                    "the guest has a new driver, and is left alone for {} s",
                    grace.as_secs()
                );
                *lock(&self.grace_end) = end;
            }
            Err(error) => error!("cannot set a timer: {error}"),
        }
    }

    /// Has the guest give away so many balloon pages, also while it boots.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and the target will be forgotten with the process.
    pub fn set_target(&self, pages: u32) -> io::Result<()> {
        if self.running() {
            *lock(&self.grace_end) = None;
        }
        let before = mem::replace(&mut lock(&self.state).config.target, pages);
        if before == pages {
            self.follow();
            return Ok(());
        }
        self.notify();
        self.save()
    }

    /// Sets how often the guest is asked for statistics, in seconds, and asks it for some. 0 is never.
    ///
    /// # Errors
    ///
    /// The system has no such timer, or the file cannot be written.
    pub fn set_stats_interval(&self, seconds: u32) -> io::Result<()> {
        self.arm(seconds)?;
        lock(&self.state).stats_interval = seconds;
        self.save()
    }

    fn arm(&self, seconds: u32) -> io::Result<()> {
        self.soon.store(0, SeqCst);
        if seconds == 0 {
            return Ok(self.timer.unset()?);
        }
        // The first sample comes at once: whoever changes the interval wants to see one.
        self.set_timer(
            Duration::from_millis(1),
            Duration::from_secs(seconds.into()),
        )
    }

    fn arm_timer(&self, first: Duration, interval: Duration) {
        if let Err(error) = self.set_timer(first, interval) {
            error!("cannot set a timer: {error}");
        }
    }

    fn set_timer(&self, first: Duration, interval: Duration) -> io::Result<()> {
        let (first, interval) = (
            TimeSpec::from_duration(first),
            TimeSpec::from_duration(interval),
        );
        let after = Expiration::IntervalDelayed(first, interval);
        Ok(self.timer.set(after, TimerSetTimeFlags::empty())?)
    }

    /// Whether the guest may have more memory than its last statistics say.
    pub fn is_outdated(&self) -> bool {
        self.soon.load(SeqCst) > 0
    }

    /// Asks the guest for statistics a few times, since it may have been given more memory: it needs a while to take it
    /// into use.
    fn ask_soon(&self) {
        let interval = lock(&self.state).stats_interval;
        if interval == 0 {
            lock(&self.stats).forget_total();
        } else if lock(&self.stats).total().is_some() {
            self.soon.store(SOON_TIMES, SeqCst);
            self.arm_timer(SOON, SOON);
        }
    }

    /// Goes back to the ordinary interval when the guest has been asked soon for long enough.
    fn asked_soon(&self) {
        if self.is_outdated() && self.soon.fetch_sub(1, SeqCst) == 1 {
            self.arm_ordinary();
        }
    }

    fn arm_ordinary(&self) {
        let interval = Duration::from_secs(lock(&self.state).stats_interval.into());
        self.arm_timer(interval, interval);
    }

    /// Changes the command of free page hinting.
    pub fn command(&self, command: impl FnOnce(&mut Hints)) {
        command(&mut lock(&self.hints));
        self.notify();
    }

    /// What the guest is asked for.
    pub fn requests(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }

    /// Asks the guest for something, and returns the id of the request.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn request(&self, command: Command) -> Result<u64, TooMany> {
        let pages = match command {
            Command::UnusedSkip(_) => lock(&self.work).balloon.no_pages(),
            _ => PageMap::default(),
        };
        let id = self.requests().begin(command, pages)?;
        self.ask();
        Ok(id)
    }

    /// Tells the guest that an answer is no longer wanted.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn cancel(&self, id: u64) -> Result<(), TooMany> {
        self.requests().cancel(id)?;
        self.ask();
        Ok(())
    }

    /// Has the worker ask the guest what there is to ask.
    fn ask(&self) {
        if let Some(number) = Kind::Requests.number(self.acked.load(SeqCst)) {
            self.wake(number);
        }
    }

    /// Tells the guest that the configuration space has changed, now or when it has a driver. Front ends
    /// do not expect the message while there is none.
    fn notify(&self) {
        self.told.store(self.asked(), SeqCst);
        self.config_changed.store(true, SeqCst);
        if self.running() && self.config_changed.swap(false, SeqCst) {
            self.channel.config_changed();
        }
    }

    /// Has the worker serve a queue.
    fn wake(&self, number: usize) {
        self.pending.fetch_or(1 << number, SeqCst);
        if let Err(error) = self.wake.write(1) {
            error!("cannot wake the worker: {error}");
        }
    }

    fn serve_queue(&self, number: usize, vrings: &[VringMutex]) {
        let acked = self.acked.load(SeqCst);
        let (Some(kind), Some(vring)) = (Kind::of(number, acked), vrings.get(number)) else {
            return;
        };
        let counters = &self.counters;
        let Some(messages) = counters.messages.get(kind as usize) else {
            return;
        };

        let keep = self.keeps_free_pages();
        if kind == Kind::Deflate && self.blocked.load(SeqCst) {
            return;
        }
        // The front end must not wait for the locks below while processes are looked at.
        let looked = match kind {
            Kind::Inflate | Kind::Reporting | Kind::Requests => {
                let files = self.sizes().files;
                let is_hazardous = !self.process_hazards(&files).is_empty();
                Some((files, is_hazardous))
            }
            Kind::Deflate | Kind::Stats | Kind::Hinting => None,
        };
        let mut vring = vring.get_mut();
        if !vring.is_enabled() {
            return;
        }
        let mut work = lock(&self.work);
        // What the page frame numbers are looked up in, and not what the library may have put in its place.
        let memory = Arc::clone(&work.memory);
        let memory: &GuestMemoryMmap = &memory;
        if kind == Kind::Inflate && !work.at_work {
            let queue = vring.get_queue();
            if !queue.ready() {
                return;
            }
            self.start(&mut work, queue.next_avail());
        }
        work.discarder.withhold = match looked {
            Some((files, _)) if files != work.balloon.files() => return self.wake(number),
            Some((_, is_hazardous)) => is_hazardous || self.inhibited().is_some(),
            None => false,
        };
        let Work {
            balloon,
            discarder,
            pages,
            pieces,
            ranges,
            heads,
            unfinished,
            taken_up,
            ..
        } = &mut *work;
        let place = kind as usize;
        let (Some(unfinished), Some(taken_up)) =
            (unfinished.get_mut(place), taken_up.get_mut(place))
        else {
            return;
        };
        let next = match kind {
            Kind::Inflate => {
                let mut inflate = Inflate {
                    memory,
                    balloon,
                    told_before_use: tells_before_use(acked),
                    begun: *taken_up,
                    discarder,
                    format: Format::of(acked),
                    counters,
                    pages,
                    pieces,
                };
                let next = serve(
                    &mut vring,
                    memory,
                    heads,
                    unfinished,
                    counters,
                    messages,
                    &mut inflate,
                );
                work.position = Some(vring.get_queue().next_avail());
                next
            }
            Kind::Deflate => {
                let mut deflate = Deflate {
                    memory,
                    balloon,
                    discarder,
                    prefault: self.settings.prefault,
                    told_before_use: tells_before_use(acked),
                    begun: *taken_up,
                    format: Format::of(acked),
                    counters,
                    pages,
                    pieces,
                };
                serve(
                    &mut vring,
                    memory,
                    heads,
                    unfinished,
                    counters,
                    messages,
                    &mut deflate,
                )
            }
            Kind::Stats => {
                let actual = lock(&self.state).config.actual;
                let size = self.is_at_rest().then(|| bytes(actual));
                lock(&self.stats).serve(&mut vring, memory, counters, messages, size);
                self.sampled.notify_all();
                self.follow();
                Next::Notified
            }
            Kind::Hinting => {
                let mut hinting = Hinting {
                    memory,
                    hints: &self.hints,
                    counters,
                };
                serve(
                    &mut vring,
                    memory,
                    heads,
                    unfinished,
                    counters,
                    messages,
                    &mut hinting,
                )
            }
            Kind::Reporting => {
                let mut reporting = Reporting {
                    balloon,
                    discarder,
                    counters,
                    keep,
                    ranges,
                    pieces,
                };
                serve(
                    &mut vring,
                    memory,
                    heads,
                    unfinished,
                    counters,
                    messages,
                    &mut reporting,
                )
            }
            Kind::Requests => {
                let mut answers = Answers {
                    memory,
                    requests: &self.requests,
                    balloon,
                    discarder,
                    counters,
                    keep,
                    pieces,
                    budget: Budget::turn(),
                    done: &mut unfinished.done,
                };
                answers.serve(&mut vring, messages)
            }
        };
        let unfinished = work.unfinished.get(place).is_some_and(Unfinished::is_some);
        if let (false, Some(taken_up)) = (unfinished, work.taken_up.get_mut(place)) {
            *taken_up = false;
        }
        let pause = next == Next::Soon && work.paused.is_none_or(|at| at.elapsed() >= BUDGET);
        if pause {
            work.paused = Some(Instant::now());
        }
        drop(work);
        drop(vring);
        match next {
            Next::Notified => {}
            Next::Soon => {
                if pause {
                    thread::sleep(PAUSE);
                }
                self.wake(number);
            }
            Next::Later => self.retry(),
        }
    }

    /// Has the deflate queue served again in a while.
    fn retry(&self) {
        self.blocked.store(true, SeqCst);
        let after = Expiration::OneShot(TimeSpec::from_duration(RETRY_INTERVAL));
        if let Err(error) = self.retry.set(after, TimerSetTimeFlags::empty()) {
            error!("cannot set a timer: {error}");
            self.blocked.store(false, SeqCst);
        }
    }

    /// A driver is at work, on an inflate queue that is to be read from `next` on.
    fn start(&self, work: &mut Work, next: u16) {
        if work.is_new_driver(next) {
            work.balloon.empty();
            work.taken_up = [false; MAX_QUEUES];
            lock(&self.hints).restart();
            {
                let mut state = lock(&self.state);
                (state.config.actual, state.config.stop_reason) = (0, 0);
            }
            self.leave_alone();
            debug!("the guest has a driver, with an empty balloon");
        } else {
            if tells_before_use(self.acked.load(SeqCst)) {
                work.balloon.refill();
            }
            debug!("the guest's driver goes on");
        }
        let target = bytes(lock(&self.state).config.target);
        if let Some(limit) = self.limit().filter(|&limit| target > limit) {
            warn!(
                "the target of {target} bytes would leave a VM of {} bytes too little; it is asked for {limit} bytes",
                self.guest_memory().unwrap_or_default()
            );
        }
        work.at_work = true;
        *lock(&self.started) = Some(Instant::now());
        self.running.store(true, SeqCst);
        self.told.store(self.asked(), SeqCst);
        self.set_unknown(false);
        if self.config_changed.swap(false, SeqCst) {
            self.channel.config_changed();
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        MAX_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.settings.features
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, SeqCst);
        // A front end that logs writes for a migration repeats them.
        if !self.running() {
            self.set_unknown(true);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The queues have it themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let needed = config_size(self.settings.features);
        let (Ok(start), Ok(length)) = (usize::try_from(offset), usize::try_from(size)) else {
            return Vec::new();
        };
        // QEMU reads all that it has when it makes the device, before there is a driver. Others read what their
        // guest reads, and no driver reads before it has accepted features.
        let first = start == 0 && self.acked.load(SeqCst) == 0;
        if first && size >= SMALLEST_CONFIG && length < needed {
            self.short_config.call_once(|| error!(
                "the VMM has {size} bytes of configuration for a device that needs {needed}, and a Linux guest \
                 would crash; start QEMU's device with config_size={needed}, or this one with fewer --features"
            ));
            return Vec::new();
        }
        self.wait_known();
        let command = lock(&self.hints).command();
        let granule = lock(&self.sizes).granule;
        // There is none below a page, also while the memory is not known (PS-V3).
        let granule = granule.unwrap_or(BALLOON_PAGE_SIZE);
        let granule = u32::try_from(granule).unwrap_or(LARGEST_GRANULE);
        let asked = self.asked();
        if self.asked.swap(asked, SeqCst) != asked {
            *lock(&self.moved) = Some(Instant::now());
        }
        let fields = lock(&self.state).config.read(asked, command, granule);
        let rest = fields.get(start..).unwrap_or_default();
        // What comes after the last field is nothing.
        rest.iter()
            .copied()
            .chain(std::iter::repeat(0))
            .take(length)
            .collect()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        *lock(&self.answered) = Some(Instant::now());
        self.wait_known();
        if let Ok(offset) = usize::try_from(offset) {
            let config = &mut lock(&self.state).config;
            let before = config.actual;
            config.write(offset, bytes);
            if config.actual != before {
                *lock(&self.moved) = Some(Instant::now());
            }
        }
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let mut work = lock(&self.work);
        work.memory = memory.memory().into_inner();
        let Work {
            balloon, memory, ..
        } = &mut *work;
        balloon.set_memory(memory, self.settings.granularity);
        *lock(&self.sizes) = Sizes {
            memory: balloon.memory(),
            granule: balloon.granule(),
            files: balloon.files(),
            hazards: balloon.hazards(),
        };
        self.ask_soon();
        self.follow();
        let large = balloon
            .granule()
            .is_some_and(|granule| granule > BALLOON_PAGE_SIZE);
        if large && self.settings.features & Feature::MustTellHost.mask() == 0 {
            // A guest can have its VMM send the memory again as often as it likes.
            self.large_granules.call_once(|| warn!(
                "the guest's memory is in huge pages, which come back to the host only when they are named at \
                 once; start this with --granule 2M, so that they may come in pieces"
            ));
        }
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::CLOEXEC)
            .inspect_err(|error| error!("cannot make an event: {error}"))
            .ok()?;
        *lock(&self.exit) = Some(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let acked = self.acked.load(SeqCst);
        let kind = usize::try_from(queue_index).map(|number| Kind::of(number, acked));
        match kind {
            Ok(Some(Kind::Inflate)) => {
                self.stop();
                debug!("the guest's driver stops");
            }
            Ok(Some(Kind::Stats)) => lock(&self.stats).restart(),
            Ok(Some(Kind::Requests)) => lock(&self.requests).restart(),
            Ok(Some(Kind::Deflate)) => self.blocked.store(false, SeqCst),
            _ => {}
        }
        // What was begun begins again where the queue continues, or never.
        if let Ok(Some(kind)) = kind {
            if let Some(unfinished) = lock(&self.work).unfinished.get_mut(kind as usize) {
                *unfinished = Unfinished::default();
            }
        }
        Ok(())
    }

    /// Never fails: an error would end the worker, and a guest could have its device stop.
    fn handle_event(
        &self,
        event: u16,
        _evset: EventSet,
        vrings: &[VringMutex],
        _thread_id: usize,
    ) -> io::Result<()> {
        match u64::from(event) {
            WAKE => {
                // It is not blocking, and what matters is what is pending.
                let _ = self.wake.read();
                let pending = self.pending.swap(0, SeqCst);
                for number in (0..MAX_QUEUES).filter(|number| pending & (1 << number) != 0) {
                    self.serve_queue(number, vrings);
                }
            }
            GRACE => {
                let _ = self.grace.wait();
                // Another driver may have started since the timer went off.
                if self.grace().is_none() {
                    self.follow();
                }
            }
            RETRY => {
                let _ = self.retry.wait();
                self.blocked.store(false, SeqCst);
                if let Some(number) = Kind::Deflate.number(self.acked.load(SeqCst)) {
                    self.serve_queue(number, vrings);
                }
            }
            TIMER => {
                // A timer that was stopped by now has nothing to read, and what matters is that it was due.
                let _ = self.timer.wait();
                self.asked_soon();
                lock(&self.stats).want();
                if let Some(number) = Kind::Stats.number(self.acked.load(SeqCst)) {
                    self.serve_queue(number, vrings);
                }
            }
            _ => {
                *lock(&self.answered) = Some(Instant::now());
                let kind = Kind::of(event.into(), self.acked.load(SeqCst));
                let notified = kind.and_then(|kind| self.counters.notifications.get(kind as usize));
                if let Some(notified) = notified {
                    notified.add(1);
                }
                self.serve_queue(event.into(), vrings);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::MAX_BATCH;
    use crate::testing::{GuestQueue, device, device_with, memory_file};
    use balloon_control::{Handler, Request};
    use balloon_wire::{VIRTIO_BALLOON_STOP_REASON_EXCLUDED, config};
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    #[test]
    fn a_driver_may_read_any_part_of_the_configuration() {
        let device = device(&[Feature::Stats], true);
        device.acked_features(Feature::Stats.mask());
        lock(&device.state).config.stop_reason = 0x0102_0304;
        let all = device.get_config(0, 64);
        assert_eq!((all.len(), &all[24..]), (64, &[0; 40][..]));
        for start in 0..40_usize {
            for length in 0..24_usize {
                let part = device.get_config(start.try_into().unwrap(), length.try_into().unwrap());
                assert_eq!(part, all[start..start + length]);
            }
        }
    }

    /// A device with a guest of 16 MiB, whose driver has started at this index.
    fn running(target: u64, next: u16) -> Device {
        running_with(memory_file(0).try_clone().unwrap(), target, next)
    }

    /// The same with this end of a channel.
    fn running_with(end: impl Into<OwnedFd>, target: u64, next: u16) -> Device {
        let device = device_with(end, &[Feature::Stats], true);
        device
            .set_target((target / BALLOON_PAGE_SIZE).try_into().unwrap())
            .unwrap();
        device.set_stats_interval(10).unwrap();
        device.acked_features(Feature::Stats.mask());
        let memory = GuestMemoryAtomic::new(GuestQueue::new().memory);
        device.update_memory(memory).unwrap();
        device.start(&mut lock(&device.work), next);
        report_late(&device);
        device
    }

    /// Has the driver send statistics with this total.
    fn report(device: &Device, total: u64) {
        let mut guest = GuestQueue::new();
        let (counters, messages) = Default::default();
        // The first buffer may be old, and is given back.
        for _ in 0..2 {
            guest.send(&[&[&5_u16.to_le_bytes()[..], &total.to_le_bytes()].concat()]);
            lock(&device.stats).serve(
                &mut guest.vring(),
                &guest.memory,
                &counters,
                &messages,
                Some(0),
            );
        }
    }

    /// Has the driver not send statistics in time.
    fn report_late(device: &Device) {
        *lock(&device.started) = Instant::now().checked_sub(REPORT_TIME);
    }

    fn asked(device: &Device) -> u64 {
        let config = device.get_config(0, 4);
        u64::from(u32::from_le_bytes(config.try_into().unwrap())) * BALLOON_PAGE_SIZE
    }

    #[test]
    fn a_kept_target_leaves_the_floor() {
        let device = running(64 << 20, 7);
        assert_eq!(asked(&device), 15 << 20);
        assert_eq!(device.limit(), Some(15 << 20));
        let error = device
            .handle(Request::Set {
                bytes: (15 << 20) + 4096,
            })
            .unwrap_err();
        assert!(error.to_string().contains("15728640"), "{error}");
        device.handle(Request::Set { bytes: 15 << 20 }).unwrap();
    }

    #[test]
    fn a_guest_does_not_wait_for_the_hosts_disk() {
        let (end, other) = UnixStream::pair().unwrap();
        let device = running_with(end, 8 << 20, 7);
        other
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        (&other).read_exact(&mut [0]).unwrap();
        thread::scope(|scope| {
            let _disk = lock(&device.file);
            scope.spawn(|| device.set_target(1024));
            (&other).read_exact(&mut [0]).unwrap();
            assert_eq!(asked(&device), 4 << 20);
            scope.spawn(|| device.inhibit(Some(60)));
            let start = Instant::now();
            while device.inhibited().is_none() {
                assert!(start.elapsed() < Duration::from_secs(5));
                thread::yield_now();
            }
        });
    }

    #[test]
    fn a_guest_that_boots_is_left_alone() {
        let device = running(8 << 20, 0);
        assert_eq!(asked(&device), 0);
        assert!(device.grace().is_some());
        // A client knows what it does.
        device.set_target(2048).unwrap();
        assert_eq!(asked(&device), 8 << 20);

        let device = running(8 << 20, 0);
        *lock(&device.grace_end) = Some(Instant::now());
        assert_eq!(asked(&device), 8 << 20);
        // One that continues keeps what it has.
        device.stop();
        lock(&device.state).config.actual = 1024;
        assert_eq!(asked(&device), 4 << 20);
        device.start(&mut lock(&device.work), 7);
        report_late(&device);
        assert_eq!(asked(&device), 8 << 20);
    }

    #[test]
    fn a_driver_keeps_its_balloon_until_it_reports() {
        let device = running(8 << 20, 7);
        lock(&device.state).config.actual = 1024;
        device.stop();
        device.start(&mut lock(&device.work), 7);
        assert_eq!(asked(&device), 4 << 20);
        report_late(&device);
        assert_eq!(asked(&device), 8 << 20);
    }

    #[test]
    fn a_balloon_that_cannot_grow_is_at_rest() {
        let device = running(8 << 20, 7);
        assert_eq!(asked(&device), 8 << 20);
        assert!(!device.is_at_rest());
        *lock(&device.moved) = Instant::now().checked_sub(2 * REST);
        assert!(device.is_at_rest());
        device.set_config(4, &7_u32.to_le_bytes()).unwrap();
        assert!(!device.is_at_rest());
        device.set_config(4, &2048_u32.to_le_bytes()).unwrap();
        assert!(device.is_at_rest());
    }

    #[test]
    fn memory_that_was_plugged_counts_before_the_guest_has_it() {
        let device = running(0, 7);
        report(&device, 4 << 20);
        assert_eq!(device.limit(), Some(3 << 20));
        let set = |bytes| device.handle(Request::Set { bytes });
        assert!(set(8 << 20).is_err());
        device
            .update_memory(GuestMemoryAtomic::new(GuestQueue::new().memory))
            .unwrap();
        set(8 << 20).unwrap();
        assert_eq!(asked(&device), 3 << 20);
        for _ in 0..SOON_TIMES {
            device.asked_soon();
        }
        assert!(set(8 << 20).is_err());
    }

    #[test]
    fn a_guest_that_reboots_starts_from_nothing() {
        let device = running(8 << 20, 7);
        lock(&device.state).config.actual = 1024;
        device.stop();
        device.acked_features(Feature::Stats.mask());
        thread::scope(|scope| {
            let target = scope.spawn(|| asked(&device));
            let excluded = VIRTIO_BALLOON_STOP_REASON_EXCLUDED.to_le_bytes();
            let place = u32::try_from(config::STOP_REASON).unwrap();
            let device = &device;
            scope.spawn(move || device.set_config(place, &excluded));
            // They come first, and wait.
            thread::sleep(Duration::from_millis(50));
            device.start(&mut lock(&device.work), 0);
            assert_eq!(target.join().unwrap(), 0);
        });
        let fields = device.state().config;
        assert_eq!(
            (fields.actual, fields.stop_reason),
            (0, VIRTIO_BALLOON_STOP_REASON_EXCLUDED)
        );
    }

    #[test]
    fn a_busy_guest_leaves_time_to_others() {
        let device = running(0, 0);
        let mut guest = GuestQueue::new();
        device
            .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
            .unwrap();
        for _ in 0..MAX_BATCH + 1 {
            guest.send(&[&[0, 1, 0, 0]]);
        }
        let before = Instant::now().checked_sub(2 * BUDGET);
        for (paused, pauses) in [(before, true), (Some(Instant::now() + BUDGET), false)] {
            lock(&device.work).paused = paused;
            // All of the batch is done in time, and there is more.
            device.serve_queue(0, &guest.vrings());
            assert_eq!(lock(&device.work).paused != paused, pauses);
            for _ in 0..MAX_BATCH {
                guest.send(&[&[0, 1, 0, 0]]);
            }
        }
    }

    #[test]
    fn a_client_does_not_wait_for_a_guest_that_is_gone() {
        let device = running(0, 7);
        device.connected.store(true, SeqCst);
        thread::scope(|scope| {
            let start = Instant::now();
            let stats = scope.spawn(|| device.fresh_stats(Duration::from_secs(600)));
            // It waits first.
            thread::sleep(Duration::from_millis(50));
            device.disconnect();
            assert!(stats.join().unwrap().is_none());
            assert!(start.elapsed() < Duration::from_secs(300));
        });
    }

    #[test]
    fn a_front_end_does_not_wait_for_a_look_at_processes() {
        let device = running(0, 7);
        let guest = GuestQueue::new();
        let vrings = guest.vrings();
        let (done, is_done) = mpsc::channel();
        thread::scope(|scope| {
            // A process that is looked at hangs in the kernel.
            let look = lock(&device.watch);
            scope.spawn(|| device.serve_queue(0, &vrings));
            // It looks.
            thread::sleep(Duration::from_millis(50));
            scope.spawn(|| {
                drop(vrings[0].get_mut());
                device
                    .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
                    .unwrap();
                done.send(()).unwrap();
            });
            let result = is_done.recv_timeout(Duration::from_secs(10));
            drop(look);
            result.unwrap();
        });
    }

    #[test]
    fn the_end_of_the_grace_is_not_missed() {
        let (end, mut other) = UnixStream::pair().unwrap();
        let device = running_with(end, 8 << 20, 0);
        other.read_exact(&mut [0]).unwrap();
        other.set_nonblocking(true).unwrap();
        let handle = || device.handle_event(GRACE.try_into().unwrap(), EventSet::IN, &[], 0);
        // That of the driver before.
        handle().unwrap();
        assert!(device.grace().is_some() && other.read(&mut [0]).is_err());

        *lock(&device.grace_end) = Some(Instant::now());
        // The guest reads for another reason, and the front end reads all.
        device.get_config(8, 4);
        handle().unwrap();
        other.read_exact(&mut [0]).unwrap();
        assert_eq!(asked(&device), 8 << 20);
    }

    #[test]
    fn nothing_of_a_guest_outlives_its_vmm() {
        let device = running(8 << 20, 7);
        device.set_config(0, &[0xff; 24]).unwrap();
        assert!(device.answered().is_some() && device.state().config.actual > 0);
        device.disconnect();
        let expected = Fields {
            target: 2048,
            ..Fields::default()
        };
        assert_eq!(device.state().config, expected);
        assert_eq!((device.answered(), device.guest_memory()), (None, None));
        assert!(device.stats().is_none());
    }

    #[test]
    fn too_short_a_configuration_is_refused() {
        let device = device(&[Feature::Stats], true);
        assert_eq!(device.get_config(0, 16).len(), 0);
        assert_eq!(device.get_config(0, 24).len(), 24);
        assert_eq!(device.get_config(0, 32).len(), 32);
        // Some front ends ask for one field at a time.
        assert_eq!(device.get_config(0, 4).len(), 4);
        assert_eq!(device.get_config(u32::MAX, 4), [0; 4]);
    }

    #[test]
    fn a_granule_is_told_without_memory() {
        let device = device(&[], true);
        assert_eq!(device.get_config(16, 4), 4096_u32.to_le_bytes());
    }

    #[test]
    fn a_new_driver_is_told_by_its_index() {
        let work = |position| Work {
            position,
            ..Work::default()
        };
        assert!(work(None).is_new_driver(0));
        assert!(work(Some(7)).is_new_driver(0));
        assert!(work(Some(7)).is_new_driver(8));
        assert!(!work(Some(7)).is_new_driver(7));
        // The device itself is new, and knows nothing of the driver before.
        assert!(!work(None).is_new_driver(7));
    }
}
