// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager: observes the host and its VMs, asks the policy, and sends its targets.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use balloon_policy::{
    Account, Decision, Millis, Observation, Pages, Policy, Profile, Refusal, Reservation, Vm, VmId,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::balloon::{Tenure, Terms};
use crate::config::{Config, PAGE};
use crate::host::Host;
use crate::link::Place;
use crate::record::{Line, Record};
use crate::reservations::{Lease, use_reservation};
use crate::state::{State, is_busy};
use crate::status::{Counts, Past, Reserved, Status, VmStatus};
use crate::text;
use crate::vm::{self, Handle, Order};

/// How long the manager waits at its start for the daemons that it has found: what they have given is not known before.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// How many actions of a VM are kept for explanations.
const HISTORY: usize = 20;

/// A VM and its tasks.
#[derive(Debug)]
struct Known {
    name: String,
    place: Place,
    handle: Handle,
    state: Option<State>,
    /// Since when the daemon of a running VM has not answered.
    lost: Option<Instant>,
    /// The VM as it was known last. It counts while its daemon has a new process that does not know the memory yet.
    vm: Option<Vm>,
    account: Option<Account>,
    history: VecDeque<Past>,
    raises: u64,
    cuts: u64,
    /// In observe mode: the newest action.
    observed: u64,
}

impl Known {
    /// Takes the newest state. Returns the one before.
    fn replace(&mut self, state: State) -> Option<State> {
        match (state.reachable, state.balloon.connected) {
            (true, true) => self.lost = None,
            (false, true) => self.lost = self.lost.or_else(|| Some(Instant::now())),
            // VMs connect to a new daemon again.
            (_, false) => {}
        }
        self.state.replace(state)
    }

    /// Whether the VM may run although its daemon does not know it, or has gone: the daemon restarts. With QEMU's own
    /// device the VM ends as well.
    fn is_awaited(&self, time: Duration) -> bool {
        matches!(self.place, Place::Daemon(_))
            && self.lost.is_some_and(|lost| lost.elapsed() < time)
    }

    /// The VM's socket is missing, or is none of the configuration any more. Returns whether the VM may run on without it.
    fn lose(&mut self, place: &Place, time: Duration) -> bool {
        let runs = |state: &State| state.balloon.connected;
        if self.state.as_ref().is_some_and(runs) {
            self.lost.get_or_insert_with(Instant::now);
        }
        let (Place::Daemon(path) | Place::Qemu(path)) = place;
        !path.exists() && self.is_awaited(time)
    }
}

pub(crate) struct Manager {
    config: Config,
    observe: bool,
    epoch: Instant,
    policy: Policy,
    host: Host,
    reports: mpsc::UnboundedSender<(VmId, State)>,
    /// The first reports have come, or the time for them is over.
    has_begun: bool,
    vms: BTreeMap<VmId, Known>,
    places: BTreeMap<Place, VmId>,
    next_vm: u32,
    leases: Vec<Lease>,
    next_lease: u32,
    last: Observation,
    charged: Pages,
    record: Option<Record>,
    counts: Counts,
    /// Floors that do not fit are reported once.
    complained: Option<Refusal>,
}

impl Manager {
    pub(crate) fn new(
        config: Config,
        observe: bool,
        record: Option<Record>,
        reports: mpsc::UnboundedSender<(VmId, State)>,
    ) -> Self {
        Self {
            policy: Policy::new(config.profile),
            config,
            observe,
            epoch: Instant::now(),
            host: Host::new(Path::new("/proc")),
            reports,
            has_begun: false,
            vms: BTreeMap::new(),
            places: BTreeMap::new(),
            next_vm: 0,
            leases: Vec::new(),
            next_lease: 1,
            last: Observation::default(),
            charged: 0,
            record,
            counts: Counts::default(),
            complained: None,
        }
    }

    /// Adds new sockets, and removes those that no longer exist. A VM outlives its daemon, and QEMU removes its own socket.
    pub(crate) fn discover(&mut self) {
        let daemons = find(&self.config.sockets).map(Place::Daemon);
        let monitors = self.config.qmp.iter().flat_map(|pattern| find(pattern));
        let found: Vec<_> = daemons.chain(monitors.map(Place::Qemu)).collect();
        self.places.retain(|place, id| {
            let known = self.vms.get_mut(id);
            let stays = found.contains(place)
                || known.is_some_and(|known| known.lose(place, self.config.lease()));
            if !stays {
                if let Some(gone) = self.vms.remove(id) {
                    log::info!(vm:% = gone.name; "{}: its socket has gone", gone.name);
                }
            }
            stays
        });
        for place in found {
            if self.places.contains_key(&place) {
                continue;
            }
            let id = VmId(self.next_vm);
            self.next_vm += 1;
            let name = self.name(&place);
            log::info!(vm:% = name; "{name}: found at {place}");
            let handle = vm::start(id, place.clone(), self.epoch, self.reports.clone());
            self.places.insert(place.clone(), id);
            self.vms.insert(
                id,
                Known {
                    name,
                    place,
                    handle,
                    state: None,
                    lost: None,
                    vm: None,
                    account: None,
                    history: VecDeque::new(),
                    raises: 0,
                    cuts: 0,
                    observed: 0,
                },
            );
        }
    }

    /// The name of the VM at this place: the place itself, if another VM has the name.
    fn name(&self, place: &Place) -> String {
        let name = place.name();
        match self.vms.values().any(|known| known.name == name) {
            true => place.to_string(),
            false => name,
        }
    }

    /// Takes a report of a VM. Returns whether a decision should follow at once. There is one each second in any case.
    pub(crate) fn report(&mut self, id: VmId, state: State) -> bool {
        let waits = self.leases.iter().any(|lease| !lease.admitted);
        self.vms.get_mut(&id).is_some_and(|known| {
            let old = known.replace(state);
            let new = known.state.as_ref();
            let is_at_rest = old
                .as_ref()
                .zip(new)
                .is_some_and(|(old, new)| new.is_at_rest(old, known.account.as_ref()));
            waits || !is_at_rest
        })
    }

    /// Decides, and sends the targets.
    pub(crate) fn step(&mut self) -> Result<()> {
        let is_unknown = |known: &Known| known.state.is_none();
        if self.epoch.elapsed() < FIRST_REPORTS && self.vms.values().any(is_unknown) {
            return Ok(());
        }
        self.has_begun = true;
        let observation = self.observation()?;
        self.check_floors(&observation);
        let decision = self.policy.step(&observation);
        self.counts.decisions += 1;
        if let Some(record) = &mut self.record {
            let line = Line {
                profile: self.config.profile,
                observation: observation.clone(),
                decision: decision.clone(),
            };
            // The VMs come first: the manager sends its decisions in any case.
            if let Err(error) = record.write(&line) {
                log::error!("recording no more decisions: {error:#}");
                self.record = None;
            }
        }
        let admitted = |lease: &&mut Lease| decision.admitted.contains(&lease.reservation.id);
        for lease in self.leases.iter_mut().filter(admitted) {
            lease.admit(Instant::now());
        }
        self.tell_tasks(&observation, &decision);
        self.act(&observation, &decision);
        self.charged = decision.charged;
        self.last = observation;
        Ok(())
    }

    fn now(&self) -> Millis {
        Millis::try_from(self.epoch.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    fn observation(&mut self) -> Result<Observation> {
        let now = self.now();
        let instant = Instant::now();
        self.leases.retain(|lease| lease.until > instant);
        let (config, leases) = (&self.config, &mut self.leases);
        let vms = self.vms.iter_mut().filter_map(|(&id, known)| {
            let state = known.state.as_ref()?;
            let is_new = known.vm.is_none();
            let may_run = state.balloon.connected || known.is_awaited(config.lease());
            let last = known.vm.take().filter(|_| may_run);
            let mut vm = state.vm(id, &known.name, config).or_else(|| {
                last.map(|last| Vm {
                    frozen: true,
                    ..last
                })
            })?;
            vm.answered = vm.answered.max(known.observed);
            if is_new {
                use_reservation(leases, &known.name, vm.memory);
            }
            known.vm = Some(vm);
            Some(vm)
        });
        let vms: Vec<_> = vms.collect();
        let resident = vms.iter().filter_map(|vm| vm.resident).sum();
        let reading = self.host.read(&self.config, now, resident)?;
        Ok(Observation {
            now,
            pool: reading.pool,
            reserve: reading.reserve,
            pressure: reading.pressure,
            reservations: self.leases.iter().map(|lease| lease.reservation).collect(),
            vms,
        })
    }

    /// Passes the state of each VM on to its tasks: how often to look at it, and with which lease.
    fn tell_tasks(&mut self, observation: &Observation, decision: &Decision) {
        for (&id, known) in &mut self.vms {
            let vm = observation.vms.iter().find(|vm| vm.id == id);
            let account = decision.accounts.iter().find(|account| account.vm == id);
            // A VM that has ended has none.
            known.account = account.copied();
            let tenure = match vm.zip(account).filter(|_| !self.observe) {
                Some((vm, account)) => tenure(&known.name, vm, account, &self.config),
                None => Tenure::Unknown,
            };
            known.handle.tenure.send_if_modified(|old| {
                let changes = *old != tenure;
                *old = tenure;
                changes
            });
            let sample = vm.and_then(|vm| vm.sample);
            let notifies = known
                .state
                .as_ref()
                .is_some_and(|state| state.balloon.notifies);
            let pace = match account {
                Some(account) if is_busy(sample, account, notifies) => vm::FAST,
                _ => vm::SLOW,
            };
            known.handle.pace.send_if_modified(|old| {
                let changes = *old != pace;
                *old = pace;
                changes
            });
        }
    }

    fn act(&mut self, observation: &Observation, decision: &Decision) {
        for action in &decision.actions {
            let Some(known) = self.vms.get_mut(&action.vm) else {
                continue;
            };
            let what = if self.observe { "would set" } else { "sets" };
            let (from, to) = text::grants(action);
            log::info!(
                vm:% = known.name, cause:% = text::cause(action.cause), from:% = from, to:% = to;
                "{}: {what} {}", known.name, text::action(action)
            );
            known.history.push_front(Past {
                at: observation.now,
                action: *action,
            });
            known.history.truncate(HISTORY);
            let old = action.account.memory - action.account.grant;
            let (all, of_vm) = match action.target < old {
                true => (&mut self.counts.raises, &mut known.raises),
                false => (&mut self.counts.cuts, &mut known.cuts),
            };
            *all += 1;
            *of_vm += 1;
            if self.observe {
                known.observed = action.number;
                continue;
            }
            let order = Order {
                number: action.number,
                target: action.target * PAGE,
                before: action.before * PAGE,
            };
            // The task ends only when the VM has gone.
            let _ = known.handle.orders.send(order);
        }
    }

    /// Logs once if the floors of all VMs do not fit.
    fn check_floors(&mut self, observation: &Observation) {
        let refusal = Policy::admit(observation, 0).err();
        let new = refusal.map(|refusal| (refusal.floors, refusal.pool / balloon_policy::GIB));
        let old = self
            .complained
            .map(|refusal| (refusal.floors, refusal.pool / balloon_policy::GIB));
        if let Some(refusal) = refusal.filter(|_| new != old) {
            log::error!("the floors do not fit: {}", text::refusal(&refusal));
        }
        self.complained = refusal;
    }

    /// Takes a new configuration, unless its floors do not fit and those of the present one do.
    pub(crate) fn reload(&mut self, config: Config) -> Result<Vec<String>> {
        let differences = config.differences(&self.config);
        let old = std::mem::replace(&mut self.config, config);
        let check = self.observation().map(|new| Policy::admit(&new, 0));
        let fitted = Policy::admit(&self.last, 0).is_ok();
        let refused = match check {
            Ok(Err(refusal)) if fitted => Some(anyhow::anyhow!(
                "the floors do not fit: {}",
                text::refusal(&refusal)
            )),
            Ok(_) => None,
            Err(error) => Some(error),
        };
        match refused {
            Some(error) => {
                self.config = old;
                Err(error.context("the configuration stays as it was"))
            }
            None => {
                self.policy.set_profile(self.config.profile);
                Ok(differences)
            }
        }
    }

    /// Reserves memory for a VM that is about to start: the one with this name, or any other.
    pub(crate) fn reserve(
        &mut self,
        bytes: u64,
        time: Duration,
        vm: Option<String>,
    ) -> Result<Reserved, Refusal> {
        let pages = bytes.div_ceil(PAGE);
        if let Err(refusal) = Policy::admit(&self.last, pages) {
            self.counts.refused += 1;
            return Err(refusal);
        }
        let id = self.next_lease;
        self.next_lease += 1;
        let reservation = Reservation { id, pages };
        self.leases.push(Lease {
            reservation,
            vm,
            time,
            until: Instant::now() + time,
            admitted: false,
        });
        self.last.reservations.push(reservation);
        Ok(Reserved {
            id,
            admitted: false,
        })
    }

    /// A reservation, as long as it lasts.
    pub(crate) fn reservation(&self, id: u32) -> Option<Reserved> {
        let lease = self
            .leases
            .iter()
            .find(|lease| lease.reservation.id == id)?;
        Some(Reserved {
            id,
            admitted: lease.admitted,
        })
    }

    /// Ends a reservation. Returns whether there was one.
    pub(crate) fn release(&mut self, id: u32) -> bool {
        let before = self.leases.len();
        self.leases.retain(|lease| lease.reservation.id != id);
        self.last.reservations.retain(|one| one.id != id);
        self.leases.len() < before
    }

    pub(crate) fn status(&self) -> Status {
        let vms = self.vms.values().map(|known| VmStatus {
            name: known.name.clone(),
            account: known.account,
            resident: known.state.as_ref().and_then(|state| state.resident),
            last: known.history.front().cloned(),
            raises: known.raises,
            cuts: known.cuts,
        });
        Status {
            now: self.now(),
            observe: self.observe,
            pool: self.last.pool,
            reserve: self.last.reserve,
            charged: self.charged,
            reserved: self
                .leases
                .iter()
                .map(|lease| lease.reservation.pages)
                .sum(),
            vms: vms.collect(),
        }
    }

    /// A VM and its last actions, the newest first.
    pub(crate) fn history(&self, name: &str) -> Option<(VmStatus, Vec<Past>)> {
        let known = self.vms.values().find(|known| known.name == name)?;
        let status = self.status().vms.into_iter().find(|vm| vm.name == name)?;
        Some((status, known.history.iter().cloned().collect()))
    }

    /// Whether the pool and the VMs are known.
    pub(crate) const fn has_begun(&self) -> bool {
        self.has_begun
    }

    pub(crate) const fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) const fn profile(&self) -> Profile {
        self.config.profile
    }
}

/// With which lease the targets of a VM are set.
fn tenure(name: &str, vm: &Vm, account: &Account, config: &Config) -> Tenure {
    // A VM that the manager leaves alone has no settings.
    if config.settings(name, vm.memory, 0).is_none() {
        return Tenure::Ended;
    }
    let fallback = vm.memory.saturating_sub(account.fallback);
    // Rounded up: the VM does not get more than its share.
    let fallback = fallback.next_multiple_of(vm.granule.max(1));
    Tenure::Renewed(Terms {
        time: config.lease(),
        fallback: fallback * PAGE,
    })
}

/// The paths that match a pattern.
fn find(pattern: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let found = glob::glob(pattern).into_iter().flatten();
    found.filter_map(Result::ok)
}
