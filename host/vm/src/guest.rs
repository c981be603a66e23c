// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A running guest and what can be done with it.

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
use crate::stopwatch::Stopwatch;

pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod power;
mod program;

/// How long a guest's kernel may print nothing while it boots or while a module is loaded, which runs its tests.
const QUIET_LIMIT: Duration = Duration::from_secs(60);

/// How long a command in the guest may take when nothing else is said.
pub(crate) const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a guest may take to switch itself off.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(60);

/// How often something that is waited for is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often the guest is looked at while an answer is waited for.
const ANSWER_INTERVAL: Duration = Duration::from_millis(200);

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// What is in the backtrace of a leak that is the driver core's: it notes why a device cannot be probed yet, and forgets
/// the note if the device goes meanwhile.
const KERNELS_OWN_LEAK: &str = "device_set_deferred_probe_reason";

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    home: RwLock<Arc<Home>>,
    console: Console,
    config: Config,
}

/// Boots a guest, hands it to `body`, switches it off and searches its log for faults.
///
/// # Errors
///
/// The guest does not boot, `body` fails, the guest does not switch itself off, or its log has a
/// fault in it that the configuration does not expect.
pub fn run<T>(config: &Config, body: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
    live(config, body, Guest::power_off)
}

/// The same, but kills the guest at the end: nothing has to be left of it that could still do something.
///
/// # Errors
///
/// As for [`run`].
pub fn run_and_kill<T>(config: &Config, body: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
    live(config, body, |_| Ok(()))
}

/// The whole life of a guest, with such an end.
fn live<T>(
    config: &Config,
    body: impl FnOnce(&Guest) -> Result<T>,
    end: impl FnOnce(&Guest) -> Result<()>,
) -> Result<T> {
    let mut guest = Guest::boot(config)?;
    let mut ready = guest.ready();
    // On a busy machine an emulated processor may stop for good while the kernel starts, long before
    // anything that is tested is in it. Once, that is no result.
    if ready.is_err() && guest.console.faults(&config.expected)?.is_empty() {
        eprintln!("a guest does not boot, and is started again");
        drop(guest);
        guest = Guest::boot(config)?;
        ready = guest.ready();
    }
    let result = ready.and_then(|()| body(&guest));
    let result = result.and_then(|value| end(&guest).map(|()| value));
    // The log is whole when QEMU has ended.
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

    /// Has the guest switch itself off, and waits for it.
    pub fn shut_down(&self) -> Result<()> {
        let home = self.home();
        home.agent.send(Command::End(End::PowerOff))?;
        ensure!(
            home.qemu.wait(POWER_OFF_TIMEOUT)?,
            "the guest does not switch itself off in {} s",
            POWER_OFF_TIMEOUT.as_secs()
        );
        Ok(())
    }

    /// Has a debug kernel look for memory that nothing points to. The first scan only notes what
    /// may be such, the second one reports what still is.
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

    /// Writes down what the driver has counted, if it is loaded and does that. What comes later is
    /// lost with the module.
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

    /// The QEMU that the guest is in now.
    pub(crate) fn home(&self) -> Arc<Home> {
        Arc::clone(&self.home.read().expect("a lock"))
    }

    /// Takes the guest for being in another QEMU from now on; the one it was in ends.
    pub(crate) fn moved(&self, home: Home) {
        *self.home.write().expect("a lock") = Arc::new(home);
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// How much memory the guest has been given.
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
    /// It is QEMU's own.
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

    /// Measures time in which the guest could have been at work.
    pub fn stopwatch(&self) -> Stopwatch {
        Stopwatch::start(self.home().qemu.id())
    }

    /// Waits until `condition` holds; `what` says in an error what did not come. The guest is given up when it could have
    /// been at work for `timeout`.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let stopwatch = self.stopwatch();
        while !condition()? {
            self.check_alive()?;
            ensure!(
                !stopwatch.has_passed(timeout),
                "{what}: not in {} s",
                timeout.as_secs()
            );
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Whether QEMU has crashed, with nothing wrong in its guest before.
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
            if let Some(reply) = pending.poll(ANSWER_INTERVAL)? {
                return Ok(reply);
            }
            self.check_alive()?;
            ensure!(
                !stopwatch.has_passed(timeout),
                "the guest does not answer in {} s",
                timeout.as_secs()
            );
        }
    }

    /// Waits for an answer for as long as the guest's kernel prints lines and reports no fault.
    fn wait_printing(&self, pending: &Pending) -> Result<Reply> {
        let mut stopwatch = self.stopwatch();
        let mut printed = self.console.mark()?;
        loop {
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
            }
            ensure!(
                !stopwatch.has_passed(QUIET_LIMIT),
                "the guest neither answers nor prints anything for {} s",
                QUIET_LIMIT.as_secs()
            );
        }
    }
}
