// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM and its balloon.
//!
//! Each VM has tasks of its own, and each request has a time limit: a device that hangs delays no other VM.

use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use balloon_policy::{Sample, VmId};
use bytesize::ByteSize;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};

use crate::balloon::{Balloon, Change, Outcome, Tenure};
use crate::config::PAGE;
use crate::daemon;
use crate::doubt::Doubt;
use crate::host::Meter;
use crate::link::{Link, Place};
use crate::qemu::Past;
use crate::resident::{Memory, lock};
use crate::state::State;

/// How often a VM's statistics and resident memory are read, at rest and while it needs attention.
pub(crate) const SLOW: Duration = Duration::from_secs(1);
pub(crate) const FAST: Duration = Duration::from_millis(100);

/// How often QEMU is asked, at least. It has statistics once a second, and they must not become too old meanwhile.
const POLL: Duration = Duration::from_millis(500);

/// How often a lease is renewed before it ends.
const RENEWALS: u32 = 3;

/// Sets a target, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) number: u64,
    pub(crate) target: u64,
    /// The target that it replaces.
    pub(crate) before: u64,
    /// By how much the device may lower the target by itself.
    pub(crate) release: u64,
}

/// A timer that makes up for no ticks that it has missed.
fn ticks(pace: Duration) -> Interval {
    let mut timer = interval(pace);
    timer.set_missed_tick_behavior(MissedTickBehavior::Skip);
    timer
}

/// How often the device at this place is looked at. A daemon sends its statistics itself.
fn interval_at(place: &Place, pace: Duration) -> Duration {
    match place {
        Place::Daemon(_) => pace,
        Place::Qemu(_) => pace.min(POLL),
    }
}

/// The manager's side of a VM's tasks. They end when it is dropped.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) orders: mpsc::UnboundedSender<Order>,
    pub(crate) pace: watch::Sender<Duration>,
    /// The lease of the VM's targets.
    pub(crate) tenure: watch::Sender<Tenure>,
    memory: Arc<Mutex<Memory>>,
}

impl Handle {
    /// The resident memory now, in bytes, if the manager can look at it.
    pub(crate) fn resident(&self) -> Option<u64> {
        lock(&self.memory).again()
    }

    /// Finds the memory of the VM that shares so many bytes with a process.
    #[cfg(test)]
    pub(crate) fn find(&self, pid: i32, shared: u64) -> Option<u64> {
        lock(&self.memory).resident(pid, shared)
    }
}

/// Starts the tasks of the VM with the device at this place. They send what it reports.
pub(crate) fn start(
    id: VmId,
    place: Place,
    epoch: Instant,
    meter: watch::Receiver<Meter>,
    reports: mpsc::UnboundedSender<(VmId, State)>,
) -> Handle {
    let (orders, received) = mpsc::unbounded_channel();
    let (pace, paces) = watch::channel(SLOW);
    let (tenure, tenures) = watch::channel(Tenure::Unknown);
    let (sample, samples) = watch::channel(None);
    let changed = Arc::new(Notify::new());
    let memory = Arc::new(Mutex::new(Memory::default()));
    let shared = Arc::clone(&memory);
    if let Place::Daemon(path) = &place {
        let watch = daemon::Watch {
            path: path.clone(),
            epoch,
            paces: paces.clone(),
            samples: sample,
            sequence: None,
            changed: Arc::clone(&changed),
        };
        tokio::spawn(watch.run());
    }
    tokio::spawn(async move {
        let mut task = Task {
            id,
            place,
            epoch,
            meter,
            memory: shared,
            link: None,
            tenure: tenures,
            renewed: None,
            conflict: None,
            pid: None,
            target: None,
            own: Vec::new(),
            answered: 0,
            doubt: None,
            failure: None,
            state: None,
            reports,
            samples,
            changed,
        };
        task.run(received, paces).await;
    });
    Handle {
        orders,
        pace,
        tenure,
        memory,
    }
}

struct Task {
    id: VmId,
    place: Place,
    epoch: Instant,
    meter: watch::Receiver<Meter>,
    memory: Arc<Mutex<Memory>>,
    link: Option<Link>,
    tenure: watch::Receiver<Tenure>,
    /// When the manager has set a target, or renewed its lease, the last time.
    renewed: Option<Instant>,
    /// The target of another program that an order has met, in bytes.
    conflict: Option<u64>,
    /// The process with the device.
    pid: Option<i32>,
    /// The target of the newest order, in bytes.
    target: Option<u64>,
    /// The targets that the manager has found, set, or may have set, in bytes. It takes a lease of no other one.
    own: Vec<u64>,
    /// The newest order with a known fate.
    answered: u64,
    doubt: Option<Doubt>,
    /// Why the device does not answer. This is logged once.
    failure: Option<String>,
    state: Option<State>,
    reports: mpsc::UnboundedSender<(VmId, State)>,
    samples: watch::Receiver<Option<Sample>>,
    /// A daemon's balloon has changed.
    changed: Arc<Notify>,
}

impl Task {
    async fn run(
        &mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        mut paces: watch::Receiver<Duration>,
    ) {
        let mut timer = ticks(interval_at(&self.place, *paces.borrow_and_update()));
        loop {
            let due = self.due();
            let renewal = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = renewal => self.renew().await,
                order = orders.recv() => match order {
                    Some(order) => self.carry_out(order).await,
                    None => return,
                },
                changed = paces.changed() => match changed {
                    Ok(()) => {
                        timer = ticks(interval_at(&self.place, *paces.borrow_and_update()));
                        continue;
                    }
                    Err(_) => return,
                },
                () = self.changed.notified() => {}
                _ = timer.tick() => {
                    // A daemon sends events, and QEMU is polled.
                    if self.is_known() && self.report_resident() {
                        continue;
                    }
                }
            }
            self.report().await;
        }
    }

    /// Sets a target. A device that refuses it has answered.
    async fn set(&mut self, order: Order) -> anyhow::Result<()> {
        // An older daemon does not know the field.
        let release = Some(order.release).filter(|&bytes| bytes > 0);
        let mut outcome = self.change(order.before, order.target, release).await?;
        if let Outcome::Conflict(target) = outcome {
            // The order before this one may have been lost.
            let doubt = self.doubt.as_ref();
            if doubt.is_some_and(|doubt| doubt.before.contains(&target)) {
                outcome = self.change(target, order.target, release).await?;
            }
        }
        self.settle(order.target, outcome);
        Ok(())
    }

    /// Sends a target that replaces the one `before`. Both are in bytes.
    async fn change(
        &mut self,
        before: u64,
        target: u64,
        release: Option<u64>,
    ) -> anyhow::Result<Outcome> {
        let terms = self.tenure.borrow().terms();
        self.renewed = Some(Instant::now());
        let change = Change {
            before,
            target,
            terms,
            release,
        };
        self.link().await?.set(change).await
    }

    /// Handles what has become of a target.
    fn settle(&mut self, target: u64, outcome: Outcome) {
        match outcome {
            Outcome::Set => self.own = vec![target],
            Outcome::Refused(reason) => {
                log::warn!(vm:% = self.place.name(); "{}: {reason}", self.place);
                // A daemon that cannot write its state file has set the target all the same.
                self.may_have_set(target);
            }
            Outcome::Conflict(target) => self.conflict = Some(target),
        }
    }

    fn may_have_set(&mut self, target: u64) {
        if !self.own.contains(&target) {
            self.own.push(target);
        }
    }

    /// When the lease must be taken, renewed or ended, if the target is the manager's own.
    fn due(&self) -> Option<Instant> {
        let is_daemon = matches!(self.link, Some(Link::Daemon(_)));
        let balloon = &self.state.as_ref().filter(|_| is_daemon)?.balloon;
        let (interval, is_needed) = match *self.tenure.borrow() {
            Tenure::Unknown => return None,
            // The first lease would end the wait for a guest that boots.
            Tenure::Renewed(terms) => (terms.time / RENEWALS, balloon.leased || !balloon.frozen),
            Tenure::Ended => (SLOW, balloon.leased),
        };
        if !is_needed || !self.own.contains(&balloon.target) {
            return None;
        }
        let renewed = self.renewed.map(|renewed| renewed + interval);
        Some(renewed.unwrap_or_else(Instant::now))
    }

    /// Takes, renews or ends the lease. If that fails, the next attempt comes before the lease runs out.
    async fn renew(&mut self) {
        let Some(target) = self.state.as_ref().map(|state| state.balloon.target) else {
            return;
        };
        match self.change(target, target, None).await {
            Ok(outcome) => self.settle(target, outcome),
            Err(_) => self.link = None,
        }
    }

    /// Reports an order that has met another target.
    fn tell_conflict(&mut self, balloon: &Balloon) {
        let Some(target) = self.conflict.take() else {
            return;
        };
        let (place, size) = (&self.place, ByteSize(target));
        let text = match balloon.lapsed {
            true => format!("the lease had run out, and the target was {size}"),
            false => format!("another program has set the target to {size}, which stays"),
        };
        log::warn!(vm:% = place.name(); "{place}: {text}");
    }

    /// Reports that another program has taken a lease.
    fn tell_claim(&self, balloon: &Balloon) {
        let was_claimed = self
            .state
            .as_ref()
            .is_some_and(|state| state.balloon.claimed);
        if balloon.claimed && !was_claimed {
            let place = &self.place;
            log::warn!(vm:% = place.name(); "{place}: another program has a lease on the target, which stays");
        }
    }

    async fn carry_out(&mut self, order: Order) {
        let number = order.number;
        self.target = Some(order.target);
        if self.set(order).await.is_err() {
            self.link = None;
            self.may_have_set(order.target);
            let earlier = self.doubt.take();
            // A daemon sets a target only if it has the one before. QEMU may execute an order twice.
            let is_only = earlier.is_none() && matches!(self.place, Place::Daemon(_));
            let mut before = earlier.map_or_else(Vec::new, |doubt| doubt.before);
            if !before.contains(&order.before) {
                before.push(order.before);
            }
            self.doubt = Some(Doubt {
                number,
                before,
                target: is_only.then_some(order.target),
                since: None,
            });
        } else if let Some(doubt) = &mut self.doubt {
            (doubt.number, doubt.target) = (number, None);
        } else {
            self.answered = number;
        }
    }

    /// Ends the doubt when the device has the order's target, or has answered for long enough.
    fn resolve(&mut self, target: Option<u64>) {
        let now = Instant::now();
        if let Some(doubt) = self.doubt.take_if(|doubt| doubt.is_over(target, now)) {
            self.answered = doubt.number;
        }
    }

    /// Whether the state of the balloon is that of a daemon, which sends an event when it changes.
    fn is_known(&self) -> bool {
        let is_reached = self.state.as_ref().is_some_and(|state| state.reachable);
        is_reached && matches!(self.link, Some(Link::Daemon(_)))
    }

    /// Reports the resident memory and the newest statistics, and returns whether it could. The manager may not be
    /// allowed to look at the memory, and then only the daemon knows how much there is.
    fn report_resident(&mut self) -> bool {
        let (Some(link), Some(state)) = (&self.link, &self.state) else {
            return false;
        };
        let all = state.balloon.memory.unwrap_or(0);
        let Some(resident) = link.resident(&mut lock(&self.memory), all) else {
            return false;
        };
        let sample = *self.samples.borrow();
        self.send(|state| {
            state.resident = Some(resident / PAGE);
            state.sample = sample;
        });
        true
    }

    /// Handles that the device does not answer.
    fn fail(&mut self, error: &anyhow::Error) {
        self.link = None;
        let text = format!("{}: {error:#}", self.place);
        if self.failure.as_ref() != Some(&text) {
            log::warn!(vm:% = self.place.name(); "{text}");
            self.failure = Some(text);
        }
        let io = error.downcast_ref::<io::Error>();
        let is_refused = io.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if is_refused && matches!(self.place, Place::Qemu(_)) {
            return self.end();
        }
        self.resolve(None);
        self.send(|state| state.reachable = false);
    }

    /// Reports that there is no VM: QEMU has ended, whose socket has stayed, or another one listens there.
    fn end(&mut self) {
        (self.pid, self.target) = (None, None);
        if let Some(doubt) = self.doubt.take() {
            self.answered = doubt.number;
        }
        let answered = self.answered;
        self.send(|state| {
            let balloon = &mut state.balloon;
            (balloon.connected, balloon.memory, balloon.driver) = (false, None, false);
            (state.answered, state.reachable) = (answered, true);
        });
    }

    async fn report(&mut self) {
        // Before the device looks at the resident memory: what the VM gives back after that is not in it.
        let is_seen = lock(&self.memory).again().is_some();
        let room = (!is_seen).then(|| self.meter.borrow().room()).flatten();
        let balloon = match self.link().await {
            Ok(link) => link.balloon().await,
            Err(error) => Err(error),
        };
        let balloon = match balloon {
            Ok(balloon) => balloon,
            Err(error) => return self.fail(&error),
        };
        self.failure = None;
        self.resolve(Some(balloon.target));
        self.tell_conflict(&balloon);
        let is_released = balloon.released > 0 && !balloon.claimed;
        if self.state.is_none() || balloon.lapsed || is_released {
            // The manager takes over what it finds, and what the daemon has set without it.
            self.may_have_set(balloon.target);
        }
        self.tell_claim(&balloon);
        let Some(link) = &mut self.link else {
            return;
        };
        let all = balloon.memory.unwrap_or(0);
        let resident = link.resident(&mut lock(&self.memory), all);
        let resident = resident.or(balloon.resident);
        let sample = link.sample(self.epoch).or(*self.samples.borrow());
        self.state = Some(State {
            balloon,
            resident: resident.map(|bytes| bytes / PAGE),
            room,
            sample,
            answered: self.answered,
            reachable: self.doubt.is_none(),
        });
        self.send(|_| {});
    }

    /// Sends the state after a change.
    fn send(&mut self, change: impl FnOnce(&mut State)) {
        if let Some(state) = &mut self.state {
            change(state);
            // The manager may have ended.
            let _ = self.reports.send((self.id, state.clone()));
        }
    }

    async fn link(&mut self) -> anyhow::Result<&mut Link> {
        let link = match self.link.take() {
            Some(link) => link,
            None => self.connect().await?,
        };
        Ok(self.link.insert(link))
    }

    async fn connect(&mut self) -> anyhow::Result<Link> {
        let (is_open, state) = (self.doubt.is_some(), self.state.as_ref());
        let known = state.map(|state| state.balloon.target);
        let past = self.target.filter(|_| is_open).or(known);
        let past = past.map(|target| Past {
            pid: self.pid,
            target,
            is_open,
        });
        let link = Link::open(&self.place, past).await?;
        let is_other = self.pid.is_some_and(|old| Some(old) != link.pid());
        if is_other && matches!(link, Link::Qemu(_)) {
            self.end();
            anyhow::bail!("another QEMU has the monitor");
        }
        self.pid = link.pid();
        Ok(link)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_timer_that_was_late_ticks_once() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.unwrap().block_on(async {
            let mut timer = ticks(FAST);
            timer.tick().await;
            std::thread::sleep(4 * FAST);
            timer.tick().await;
            let next = tokio::time::timeout(Duration::ZERO, timer.tick()).await;
            assert!(next.is_err());
        });
    }

    /// The policy takes nothing from a VM whose statistics are older than 2.5 s. QEMU has new ones after a second, and
    /// a poll finds them. The time of the old ones may be that of the poll before.
    #[test]
    fn qemu_is_polled_more_often_than_its_statistics_grow_old() {
        let interval = |pace| interval_at(&Place::Qemu(PathBuf::new()), pace);
        assert!(Duration::from_secs(1) + 2 * interval(SLOW) < Duration::from_millis(2_500));
        assert_eq!(interval(FAST), FAST);
        assert_eq!(interval_at(&Place::Daemon(PathBuf::new()), SLOW), SLOW);
    }
}
