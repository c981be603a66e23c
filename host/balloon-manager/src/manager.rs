// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager: observes the host and its VMs, asks the policy, and sends its targets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use balloon_policy::{
    Account, Decision, Millis, Observation, Pages, Policy, Profile, Refusal, Reservation, Vm, VmId,
};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::balloon::{Tenure, Terms};
use crate::config::{Config, PAGE};
use crate::host::{Host, Meter};
use crate::known::Known;
use crate::link::Place;
use crate::record::{Line, Record};
use crate::reservations::{Lease, use_reservation};
use crate::savings::{Proposal, Savings};
use crate::state::{State, is_busy};
use crate::status::{Counts, Past, Reserved, Status, VmStatus};
use crate::text;
use crate::vm::{self, Order};
use crate::waits::Waits;

/// How long the manager waits at its start for the daemons that it has found: what they have given is not known before.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// Where the kernel describes the host.
const PROC: &str = "/proc";

/// How many actions of a VM are kept for explanations.
const HISTORY: usize = 20;

pub(crate) struct Manager {
    config: Config,
    observe: bool,
    epoch: Instant,
    policy: Policy,
    host: Host,
    meter: watch::Sender<Meter>,
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
    savings: Savings,
    waits: Waits,
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
            meter: watch::Sender::new(Meter::new(Path::new(PROC), config.clone())),
            config,
            observe,
            epoch: Instant::now(),
            host: Host::new(Path::new(PROC)),
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
            savings: Savings::default(),
            waits: Waits::default(),
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
            let (meter, reports) = (self.meter.subscribe(), self.reports.clone());
            let handle = vm::start(id, place.clone(), self.epoch, meter, reports);
            self.places.insert(place.clone(), id);
            self.vms.insert(id, Known::new(name, place, handle));
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
        if self.observe {
            let vms = observation.vms.iter();
            let both = vms.filter_map(|vm| Some((self.vms.get(&vm.id)?.vm.as_ref()?, vm)));
            self.savings.update(observation.now, both);
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
        let present = self.host.room(config)?;
        let (mut room, mut resident) = (present, 0);
        let vms = self.vms.iter_mut().filter_map(|(&id, known)| {
            known.measure(present);
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
            vm.frozen |= known.paused;
            if is_new {
                use_reservation(leases, &known.name, vm.memory);
            }
            known.vm = Some(vm);
            if let (Some(room), Some(then), Some(_)) = (&mut room, known.room, vm.resident) {
                *room = room.least(then);
            }
            resident += vm.resident.unwrap_or(0);
            Some(known.proposed(vm))
        });
        let vms: Vec<_> = vms.collect();
        let reading = self.host.read(&self.config, now, room, resident);
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
            // A balloon that is only observed follows at once.
            let real = vm.zip(account).filter(|_| !self.observe);
            if let Some(time) = known.follow_wait(real, observation.now) {
                self.waits.add(time);
            }
            let tenure = match real {
                Some(_) if known.paused => Tenure::Ended,
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
                known.proposal = known.vm.map(|vm| Proposal {
                    target: action.target,
                    of: vm.target,
                });
                continue;
            }
            let order = Order {
                number: action.number,
                target: action.target * PAGE,
                before: action.before * PAGE,
                release: action.release * PAGE,
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
        let differences = config.differences(&self.config)?;
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
                let meter = Meter::new(Path::new(PROC), self.config.clone());
                self.meter.send_replace(meter);
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

    /// Leaves a VM alone from now on, or manages it again. Returns whether there is one with this name.
    pub(crate) fn pause(&mut self, name: &str, paused: bool) -> bool {
        match self.vms.values_mut().find(|known| known.name == name) {
            Some(known) => known.paused = paused,
            None => return false,
        }
        true
    }

    pub(crate) fn status(&self) -> Status {
        let vms = self.vms.values().map(|known| VmStatus {
            name: known.name.clone(),
            account: known.account,
            state: text::state(known.account.as_ref()).to_owned(),
            cause: known.cause().map(str::to_owned),
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
            saved: self.savings.pages,
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

    /// In observe mode: what the host would have saved.
    pub(crate) fn savings(&self) -> Option<Savings> {
        self.observe.then_some(self.savings)
    }

    pub(crate) const fn waits(&self) -> &Waits {
        &self.waits
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

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use balloon_policy::{GIB, MIB, Sample};
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::balloon::Balloon;

    /// A guest with a balloon of this size and no available memory.
    fn state(memory: Pages, size: Pages, resident: Option<Pages>) -> State {
        State {
            balloon: Balloon {
                memory: Some(memory * PAGE),
                unusable: 0,
                connected: true,
                vmm: None,
                largest: memory * PAGE,
                target: size * PAGE,
                leased: false,
                claimed: false,
                notifies: false,
                lapsed: false,
                release: None,
                released: 0,
                size: size * PAGE,
                resident: None,
                granule: PAGE,
                driver: true,
                frozen: false,
                stopped: None,
            },
            resident,
            room: None,
            sample: Some(Sample {
                taken: 0,
                free: 0,
                available: 0,
                stalls: 0,
                swapped_in: 0,
                kills: 0,
            }),
            answered: 0,
            reachable: true,
        }
    }

    /// A manager of a measured pool with the VMs 0 and 1, whose sockets do not answer.
    struct Fixture {
        directory: tempfile::TempDir,
        manager: Manager,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path();
            for vm in ["a", "b"] {
                fs::create_dir(path.join(vm)).unwrap();
                File::create(path.join(vm).join("control.sock")).unwrap();
            }
            let config = Config {
                sockets: format!("{}/*/control.sock", path.display()),
                ..Config::default()
            };
            let (reports, _) = mpsc::unbounded_channel();
            let mut manager = Manager::new(config, false, None, reports);
            manager.host = Host::new(path);
            manager.discover();
            Self { directory, manager }
        }

        /// The host has this much available memory.
        fn set_available(&self, pages: Pages) {
            let kib = pages * 4;
            let text = format!("MemAvailable: {kib} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n");
            fs::write(self.directory.path().join("meminfo"), text).unwrap();
        }

        /// Decides. Returns the pool.
        fn step(&mut self) -> Pages {
            self.manager.step().unwrap();
            self.manager.last.pool
        }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test);
    }

    /// The pool and what the second VM gets, which is in need, after the first one has given memory back between its report
    /// and the decision. It has done so without its balloon, and may use the memory again.
    fn decide(given: Pages) -> (Pages, Pages) {
        const ALL: Pages = 128 * MIB;
        let mut fixture = Fixture::new();
        fixture.set_available(GIB);
        let memory = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
        let bytes = |pages: Pages| i64::try_from(pages * PAGE).unwrap();
        fallocate(&memory, FallocateFlags::empty(), 0, bytes(ALL)).unwrap();
        let pid = std::process::id().try_into().unwrap();
        let handle = &fixture.manager.vms[&VmId(0)].handle;
        assert_eq!(handle.find(pid, ALL * PAGE), Some(ALL * PAGE));
        fixture.manager.report(VmId(0), state(ALL, 0, Some(ALL)));
        let needy = state(4 * GIB, 4 * GIB - 256 * MIB, None);
        fixture.manager.report(VmId(1), needy);
        if given > 0 {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&memory, hole, 0, bytes(given)).unwrap();
        }
        fixture.set_available(GIB + given);
        let pool = fixture.step();
        let past = fixture.manager.vms[&VmId(1)].history.front().unwrap();
        (pool, 4 * GIB - past.action.target)
    }

    #[test]
    fn memory_that_a_vm_gives_back_between_a_report_and_a_decision_is_not_granted() {
        run(async {
            let (pool, grant) = decide(0);
            assert_eq!(pool, GIB + 128 * MIB);
            assert!(grant > 512 * MIB, "{grant}");
            assert_eq!(decide(100 * MIB), (pool, grant));
        });
    }

    #[test]
    fn a_pool_with_reported_memory_is_not_larger_than_at_the_report() {
        run(async {
            let mut fixture = Fixture::new();
            fixture.set_available(3 * GIB);
            // The VM has so much, and gives back or takes some before the manager has the report.
            let report = |fixture: &mut Fixture, resident, later| {
                let mut vm = state(2 * GIB, 0, Some(resident));
                vm.room = fixture.manager.host.room(&Config::default()).unwrap();
                fixture.set_available(later);
                fixture.manager.report(VmId(0), vm);
                fixture.manager.report(VmId(1), state(GIB, 0, None));
            };
            report(&mut fixture, 2 * GIB, 4 * GIB);
            assert_eq!(fixture.step(), 5 * GIB);
            // It, or another program, gives memory back, or takes it.
            fixture.set_available(4 * GIB);
            assert_eq!(fixture.step(), 5 * GIB);
            fixture.set_available(2 * GIB);
            assert_eq!(fixture.step(), 4 * GIB);
            fixture.set_available(4 * GIB);
            report(&mut fixture, GIB, 4 * GIB);
            assert_eq!(fixture.step(), 5 * GIB);
            report(&mut fixture, GIB, 3 * GIB);
            assert_eq!(fixture.step(), 4 * GIB);
        });
    }
}
