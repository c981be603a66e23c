// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A running guest, and operations on it.

use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use agent::{Command, End, Exit, Reply};
use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::agent::{Agent, Pending};
use crate::config::Config;
use crate::console::Console;
use crate::coverage::SECTIONS;
use crate::daemon::Daemon;
use crate::driver::Driver;
use crate::home::Home;
use crate::memory_file::MemoryFile;
use crate::qmp::Qmp;
use crate::size::Size;
use crate::stopwatch::{PATIENCE, Stopwatch};

pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod power;
mod program;
pub(crate) mod system;

/// How often a condition is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often the guest is checked during a wait for an answer.
const ANSWER_INTERVAL: Duration = Duration::from_millis(200);

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// The backtrace of a leak of the driver core: it stores why a device cannot be probed yet, and loses that text if the
/// device is removed meanwhile.
const KERNELS_OWN_LEAK: &str = "device_set_deferred_probe_reason";

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    home: RwLock<Arc<Home>>,
    console: Console,
    config: Config,
}

/// Boots a guest, passes it to `body`, powers it off and searches its log for faults.
///
/// # Errors
///
/// The guest does not boot, `body` fails, the guest does not power off, or its log has a fault that
/// the configuration does not expect.
pub fn run<T>(config: &Config, body: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
    live(config, body, Guest::power_off)
}

/// The same for several guests, which boot one after the other.
///
/// # Errors
///
/// As for [`run`].
pub fn run_all<T>(configs: &[Config], body: impl FnOnce(&[&Guest]) -> Result<T>) -> Result<T> {
    run_more(configs, &[], body)
}

fn run_more<T>(
    configs: &[Config],
    booted: &[&Guest],
    body: impl FnOnce(&[&Guest]) -> Result<T>,
) -> Result<T> {
    match configs.split_first() {
        None => body(booted),
        Some((first, rest)) => run(first, |guest| {
            let booted: Vec<_> = booted.iter().copied().chain([guest]).collect();
            run_more(rest, &booted, body)
        }),
    }
}

/// The same as [`run`], but kills the guest at the end: `body` may leave the guest unable to run.
///
/// # Errors
///
/// As for [`run`].
pub fn run_and_kill<T>(config: &Config, body: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
    live(config, body, |_| Ok(()))
}

/// The whole life of a guest, with this end.
fn live<T>(
    config: &Config,
    body: impl FnOnce(&Guest) -> Result<T>,
    end: impl FnOnce(&Guest) -> Result<()>,
) -> Result<T> {
    let guest = Guest::boot(config)?;
    let result = guest.ready().and_then(|()| body(&guest));
    let result = result.and_then(|value| end(&guest).map(|()| value));
    // The log is complete when QEMU has ended.
    drop(guest.home);
    match (result, guest.console.faults(&config.expected)?.first()) {
        (result, None) => result,
        (Ok(_), Some(fault)) => bail!("the guest's kernel reports: {fault}"),
        (Err(error), Some(fault)) => {
            Err(error.context(format!("the guest's kernel reports: {fault}")))
        }
    }
}

impl Guest {
    fn boot(config: &Config) -> Result<Self> {
        config.clear_logs()?;
        let home = Home::start(config, Agent::new)?;
        let guest = Self {
            home: RwLock::new(Arc::new(home)),
            console: Console::new(config.console()),
            config: config.clone(),
        };
        if config.target > Size::default() {
            guest.home().control(config.memory).request(config.target)?;
        }
        Ok(guest)
    }

    fn ready(&self) -> Result<()> {
        let pending = self.home().agent.send(Command::Ping)?;
        self.wait_printing(&pending)
            .context("the guest does not boot")?;
        Ok(())
    }

    fn power_off(&self) -> Result<()> {
        self.find_leaks()?;
        self.save_coverage()?;
        self.shut_down()
    }

    /// Powers off the guest, and waits until QEMU has ended.
    pub fn shut_down(&self) -> Result<()> {
        let home = self.home();
        home.agent.send(Command::End(End::PowerOff))?;
        ensure!(
            home.qemu.wait(PATIENCE)?,
            "the guest does not switch itself off in {} s",
            PATIENCE.as_secs()
        );
        Ok(())
    }

    /// Makes a debug kernel search for leaked memory. The first scan only marks suspects, the
    /// second one reports those that remain.
    fn find_leaks(&self) -> Result<()> {
        if self.exec(&["test", "-e", KMEMLEAK])?.exit != Exit::Status(0) {
            return Ok(());
        }
        for _ in 0..2 {
            self.write_file(KMEMLEAK, "scan")?;
        }
        let leaks = self.read_file(KMEMLEAK)?;
        let leaks: Vec<_> = leaks
            .split("unreferenced object")
            .skip(1)
            .filter(|leak| !leak.contains(KERNELS_OWN_LEAK))
            .collect();
        ensure!(leaks.is_empty(), "kmemleak finds:{}", leaks.concat());
        Ok(())
    }

    /// Writes the driver's coverage counters to a file, if it is loaded and has them. Later counts
    /// are lost with the module.
    fn save_coverage(&self) -> Result<()> {
        let Some(coverage) = &self.config.artifacts.coverage else {
            return Ok(());
        };
        let directory = format!("/sys/module/{}/sections", Driver::Rust.name());
        let files = SECTIONS.map(|section| format!("{directory}/{section}"));
        let output = self.exec(&["cat", &files[0], &files[1], &files[2]])?;
        if output.exit != Exit::Status(0) {
            return Ok(());
        }
        let addresses = output
            .stdout
            .lines()
            .map(|line| Ok(u64::from_str_radix(line.trim_start_matches("0x"), 16)?))
            .collect::<Result<Vec<_>>>()?;
        let addresses = <[u64; 3]>::try_from(addresses)
            .map_err(|addresses| anyhow!("the sections lie at {addresses:x?}"))?;
        coverage.save(&self.qmp(), addresses)
    }

    /// The current QEMU of the guest.
    pub(crate) fn home(&self) -> Arc<Home> {
        Arc::clone(&self.home.read().expect("a lock"))
    }

    /// Makes another QEMU the current one, and ends the previous one.
    pub(crate) fn moved(&self, home: Home) {
        *self.home.write().expect("a lock") = Arc::new(home);
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The VM's memory.
    pub fn memory(&self) -> Size {
        self.config.memory
    }

    /// The size of the guest's pages.
    pub fn page_size(&self) -> Size {
        self.config.artifacts.kernel.page_size()
    }

    /// The guest's log.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The connection to QEMU.
    pub fn qmp(&self) -> Arc<Qmp> {
        Arc::clone(&self.home().qmp)
    }

    /// The daemon that has the balloon device.
    ///
    /// # Errors
    ///
    /// The device is QEMU's own.
    pub fn daemon(&self) -> Result<Arc<Daemon>> {
        self.home()
            .daemon
            .clone()
            .context("the guest's balloon is QEMU's own")
    }

    /// How much of the host's memory QEMU has in use.
    pub fn resident(&self) -> Result<Size> {
        self.home().qemu.resident()
    }

    /// The file that holds the guest's memory.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn memory_file(&self) -> Result<MemoryFile> {
        match &self.home().memory_file {
            Some(file) => MemoryFile::open(file),
            None => MemoryFile::of(self.home().qemu.id()),
        }
    }

    /// How much of the guest's memory is in the host's transparent huge pages.
    ///
    /// # Errors
    ///
    /// The guest's memory is no anonymous mapping of its own.
    pub fn transparent_huge_pages(&self) -> Result<Size> {
        self.home().qemu.transparent_huge_pages(self.memory())
    }

    /// Measures the time in which the guest could run.
    pub fn stopwatch(&self) -> Stopwatch {
        Stopwatch::start(self.home().qemu.id())
    }

    /// Waits until `condition` holds; `what` describes it in an error. Fails when the guest could run for `timeout`
    /// meanwhile.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let stopwatch = self.stopwatch();
        loop {
            let is_over = stopwatch.has_passed(timeout);
            if condition()? {
                return Ok(());
            }
            self.check_alive()?;
            ensure!(
                !is_over,
                "{what}: not in {} s ({stopwatch})",
                timeout.as_secs()
            );
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Whether QEMU has crashed, without an earlier fault in its guest.
    pub fn is_lost(&self) -> bool {
        let faults = self.console().faults(&self.config.expected);
        self.home().qemu.wait(Duration::from_secs(1)).is_err()
            && faults.is_ok_and(|faults| faults.is_empty())
    }

    /// Fails when the guest's kernel has reported a fault that the configuration does not expect.
    pub fn check_alive(&self) -> Result<()> {
        let faults = self.console.faults(&self.config.expected)?;
        ensure!(faults.is_empty(), "the guest's kernel reports a fault");
        Ok(())
    }

    pub(crate) fn call(&self, command: Command, timeout: Duration) -> Result<Reply> {
        self.wait(&self.home().agent.send(command)?, timeout)
    }

    fn wait(&self, pending: &Pending, timeout: Duration) -> Result<Reply> {
        let stopwatch = self.stopwatch();
        loop {
            let is_over = stopwatch.has_passed(timeout);
            if let Some(reply) = pending.poll(ANSWER_INTERVAL)? {
                return Ok(reply);
            }
            self.check_alive()?;
            ensure!(
                !is_over,
                "the guest does not answer in {} s ({stopwatch})",
                timeout.as_secs()
            );
        }
    }

    /// Waits for an answer for as long as the guest's kernel prints lines and reports no fault.
    fn wait_printing(&self, pending: &Pending) -> Result<Reply> {
        let mut stopwatch = self.stopwatch();
        let mut printed = self.console.mark()?;
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            if let Some(reply) = pending.poll(ANSWER_INTERVAL)? {
                return Ok(reply);
            }
            self.check_alive()?;
            let now = self.console.mark()?;
            if now != printed {
                // A kernel that hangs may report that again and again.
                let faults = self.console.faults(&self.config.expected)?;
                if let Some(fault) = faults.first() {
                    bail!("the guest's kernel reports: {fault}");
                }
                printed = now;
                stopwatch.restart();
                continue;
            }
            ensure!(
                !is_over,
                "the guest neither answers nor prints anything for {} s ({stopwatch})",
                PATIENCE.as_secs()
            );
        }
    }
}
