// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host of several guests: the program that divides its memory, and what can be seen of that.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balloon_policy::{MIB, Millis, Observation, Pages, Sample, Settings, Vm, VmId};
use balloon_simulator::rules::{self, Rule, View};
use vm::{Guest, Manager, Size};

/// The rule that is none of the simulator: the manager itself.
pub(super) const MANAGER: &str = "balloon-manager";

/// How often the memory of the guests is read, and how often a rule may act.
const SAMPLING: Duration = Duration::from_millis(10);
const STEP: Duration = Duration::from_millis(100);

/// What a rule leaves to each guest.
const FLOOR: Pages = 512 * MIB;

/// How long the first division may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// A value of each guest in MiB, repeatedly, with the time in seconds.
pub(super) type Series = Vec<(f64, Vec<f64>)>;

/// What was seen.
pub(super) struct Seen {
    /// What the guests had of the host's memory.
    pub(super) resident: Series,
    /// What their balloons left to them.
    pub(super) granted: Series,
}

pub(super) struct Host<'a> {
    pub(super) guests: &'a [&'a Guest],
    pool: Size,
    /// The name of the rule.
    name: &'static str,
    program: PathBuf,
    logs: PathBuf,
    rule: Mutex<Option<Box<dyn Rule>>>,
    manager: Mutex<Option<Manager>>,
    start: Instant,
}

impl<'a> Host<'a> {
    /// A host whose rule does not act yet.
    pub(super) fn new(
        guests: &'a [&'a Guest],
        pool: Size,
        name: &'static str,
        [program, logs]: [PathBuf; 2],
    ) -> Self {
        Self {
            guests,
            pool,
            name,
            program,
            logs,
            rule: Mutex::default(),
            manager: Mutex::default(),
            start: Instant::now(),
        }
    }

    /// The time in seconds.
    pub(super) fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn rule(&self) -> MutexGuard<'_, Option<Box<dyn Rule>>> {
        self.rule.lock().expect("a lock")
    }

    /// Begins to divide the pool, and waits until the guests have no more than that.
    pub(super) fn divide(&self) -> Result<()> {
        let memory: Vec<_> = self.guests.iter().map(|one| one.memory()).collect();
        if self.name == MANAGER {
            self.begin("manager")?;
            let all: Size = memory.iter().copied().sum();
            return self.guests[0].wait_until("the pool is divided", PATIENCE, || {
                let sizes = self.guests.iter().map(|guest| guest.balloon().size());
                Ok(all <= self.pool + sizes.sum::<Result<Size>>()?)
            });
        }
        let pages: Vec<_> = memory.iter().map(|memory| memory.as_pages()).collect();
        let grants = self.named()?.start(self.pool.as_pages(), &pages);
        for (guest, grant) in self.guests.iter().zip(grants.into_iter().flatten()) {
            let balloon = guest.memory().saturating_sub(Size::pages(grant));
            guest.balloon().settle(balloon)?;
        }
        self.begin("manager")
    }

    fn named(&self) -> Result<Box<dyn Rule>> {
        let mut all = rules::all().into_iter();
        let rule = all.find(|rule| rule.name() == self.name);
        rule.with_context(|| format!("there is no rule {}", self.name))
    }

    /// The rule acts from now on. The manager logs to this directory.
    pub(super) fn begin(&self, logs: &str) -> Result<()> {
        if self.name != MANAGER {
            *self.rule() = Some(self.named()?);
            return Ok(());
        }
        let numbers = 1..=self.guests.len();
        let names: Vec<_> = numbers.map(|one| format!("vm{one}")).collect();
        let names = names.iter().map(String::as_str);
        let guests: Vec<_> = names.zip(self.guests.iter().copied()).collect();
        let settings = format!(
            "profile = 'density'\nlease = 5\n[host]\npool = '{}MiB'\n",
            self.pool.as_mib()
        );
        let manager = Manager::start(&self.program, &self.logs.join(logs), &guests, &settings)?;
        *self.manager.lock().expect("a lock") = Some(manager);
        Ok(())
    }

    /// The rule acts no more: its program is killed.
    pub(super) fn kill(&self) {
        self.manager.lock().expect("a lock").take();
        self.rule().take();
    }

    /// Observes the host while `work` runs.
    pub(super) fn watch<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Seen)> {
        let files = self.guests.iter().map(|guest| guest.memory_file());
        let files: Vec<_> = files.collect::<Result<_>>()?;
        let resident = || files.iter().map(|file| Ok(mib(file.resident()?))).collect();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let over = &over;
            let resident = scope.spawn(move || self.series(SAMPLING, over, resident));
            let granted = scope.spawn(move || self.series(STEP, over, || self.step()));
            let result = work();
            over.store(true, Ordering::Relaxed);
            let seen = Seen {
                resident: resident.join().expect("a thread does not panic")?,
                granted: granted.join().expect("a thread does not panic")?,
            };
            Ok((result?, seen))
        })
    }

    fn series(
        &self,
        every: Duration,
        over: &AtomicBool,
        mut read: impl FnMut() -> Result<Vec<f64>>,
    ) -> Result<Series> {
        let mut series = Series::new();
        while !over.load(Ordering::Relaxed) {
            let start = Instant::now();
            series.push((self.now(), read()?));
            thread::sleep(every.saturating_sub(start.elapsed()));
        }
        ensure!(!series.is_empty(), "the host was not observed");
        Ok(series)
    }

    /// Lets the rule act. Returns what the guests may use.
    fn step(&self) -> Result<Vec<f64>> {
        let vms = (0..).zip(self.guests).map(|(id, guest)| self.vm(id, guest));
        let vms: Vec<Vm> = vms.collect::<Result<_>>()?;
        let granted = vms.iter().map(|vm| match vm.driver {
            true => mib(Size::pages(vm.memory - vm.target)),
            false => mib(Size::pages(vm.memory)),
        });
        let granted = granted.collect();
        if let Some(rule) = self.rule().as_mut() {
            let observation = Observation {
                now: self.milliseconds()?,
                pool: self.pool.as_pages(),
                vms,
                ..Observation::default()
            };
            let truth = Vec::new();
            for (place, target) in rule.step(&View { observation, truth }) {
                self.guests[place].balloon().request(Size::pages(target))?;
            }
        }
        Ok(granted)
    }

    fn milliseconds(&self) -> Result<Millis> {
        Ok(self.start.elapsed().as_millis().try_into()?)
    }

    /// A VM as rules see it.
    fn vm(&self, id: u32, guest: &Guest) -> Result<Vm> {
        let info = guest.daemon()?.info()?;
        let pages = |bytes| Size::bytes(bytes).as_pages();
        let memory = guest.memory().as_pages();
        let statistics = guest.balloon().statistics()?;
        let sample = statistics.map(|statistics| -> Result<Sample> {
            Ok(Sample {
                taken: self.milliseconds()?,
                free: pages(statistics.get("free-memory")?),
                available: pages(statistics.get("available-memory")?),
                stalls: 0,
                swapped_in: 0,
                kills: 0,
            })
        });
        let settings = Settings {
            floor: FLOOR,
            ceiling: memory,
            weight: 1_000,
        };
        Ok(Vm {
            size: pages(info.held).min(memory),
            resident: info.resident.map(pages),
            driver: info.guest.driver,
            sample: sample.transpose()?,
            ..Vm::new(VmId(id), settings, memory, pages(info.target).min(memory))
        })
    }
}

fn mib(size: Size) -> f64 {
    size.as_mib() as f64
}
