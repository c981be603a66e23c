// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A running guest and what can be done with it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use agent::{Command, End, Exit, Load, LoadId, LoadStatus, Output, Progress, Reply};
use anyhow::{Context, Result, bail, ensure};

use crate::agent::{Agent, Pending};
use crate::balloon::Balloon;
use crate::console::Console;
use crate::daemon::Daemon;
use crate::memory_file::MemoryFile;
use crate::qemu::{Config, Qemu};
use crate::qmp::Qmp;
use crate::size::Size;
use crate::stopwatch::Stopwatch;

mod power;

pub use power::{Hibernated, hibernate};

/// How long a guest's kernel may print nothing while it boots or while a module is loaded, which runs its tests.
const QUIET_LIMIT: Duration = Duration::from_secs(60);

/// How long a command in the guest may take when nothing else is said.
pub(crate) const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a load may take for a MiB, or for one pass through its memory.
const LOAD_TIMEOUT: Duration = Duration::from_secs(180);

/// How long unloading a module may take.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(120);

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

/// The drivers that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// This repository's.
    Rust,
    /// The kernel's own.
    C,
    /// This repository's, built to say of memory in use that it is unused.
    Lying,
}

impl Driver {
    /// The file that has the module.
    pub fn file(self) -> &'static str {
        match self {
            Self::Rust => "virtio-balloon-rs.ko",
            Self::C => "virtio_balloon.ko",
            Self::Lying => "virtio-balloon-rs-lying.ko",
        }
    }

    /// The parameters with which it leaves so little to its guest that nearly all can be taken.
    pub fn low_floor(self) -> &'static [&'static str] {
        match self {
            Self::C => &[],
            Self::Rust | Self::Lying => &["floor_mib=32"],
        }
    }

    /// The module's name, and the driver's on the virtio bus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rust | Self::Lying => "virtio_balloon_rs",
            Self::C => "virtio_balloon",
        }
    }
}

/// The guest's own view of its memory, from /proc/meminfo.
#[derive(Clone, Copy, Debug)]
pub struct Meminfo {
    /// All that the kernel manages.
    pub total: Size,
    /// What is not used at all, without what is on the processors' own lists.
    pub free: Size,
    /// What can be had without swapping.
    pub available: Size,
    /// What is in balloons.
    pub balloon: Size,
}

/// The QEMU that a guest is in, and the ways into it. A guest that migrates gets another one.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) qemu: Qemu,
    /// The file that holds the guest's memory, if it has a name.
    pub(crate) memory_file: Option<PathBuf>,
    pub(crate) qmp: Arc<Qmp>,
    pub(crate) agent: Agent,
    pub(crate) daemon: Option<Arc<Daemon>>,
}

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

impl Home {
    /// Starts a QEMU; `agent` makes the connection to the agent from the stream that leads to it.
    pub(crate) fn start(
        config: &Config,
        agent: impl FnOnce(UnixStream) -> Result<Agent>,
    ) -> Result<Self> {
        let daemon = match &config.daemon {
            None if config.has_daemon() => Some(Arc::new(Daemon::start(config)?)),
            daemon => daemon.clone(),
        };
        let socket = daemon.as_ref().map(|daemon| daemon.socket());
        let (qemu, streams) = Qemu::start(config, socket.as_deref())?;
        let qmp = Qmp::new(streams.qmp, qemu.id())
            .with_context(|| format!("QEMU does not start: {}", qemu.complaint()))?;
        Ok(Self {
            qemu,
            memory_file: config.memory_file.clone(),
            qmp: Arc::new(qmp),
            agent: agent(streams.agent)?,
            daemon,
        })
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
            guest.balloon().request(config.target)?;
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

    /// The balloon, as the host sees it.
    pub fn balloon(&self) -> Balloon<'_> {
        Balloon::new(self)
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

    /// Loads a module with its parameters, such as `floor_mib=64`.
    pub fn insmod(&self, driver: Driver, parameters: &[&str]) -> Result<()> {
        let module = format!("/modules/{}", driver.file());
        let argv = [&["insmod", &module], parameters].concat();
        let pending = self.start(&argv, None)?;
        let output = program_output(self.wait_printing(&pending)?)?;
        successful(&argv, output)?;
        Ok(())
    }

    /// Unloads a module.
    pub fn rmmod(&self, driver: Driver) -> Result<()> {
        self.save_coverage()?;
        let argv = ["rmmod", driver.name()];
        let pending = self.start(&argv, None)?;
        let output = program_output(self.wait(&pending, UNLOAD_TIMEOUT)?)?;
        successful(&argv, output)?;
        Ok(())
    }

    /// The guest's own view of its memory.
    pub fn meminfo(&self) -> Result<Meminfo> {
        self.fold_counters()?;
        let text = self.read_file("/proc/meminfo")?;
        let field = |name: &str| -> Result<Size> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.split_whitespace().next());
            Ok(Size::kib(
                kib.with_context(|| format!("/proc/meminfo has no {name}"))?
                    .parse()?,
            ))
        };
        Ok(Meminfo {
            total: field("MemTotal")?,
            free: field("MemFree")?,
            available: field("MemAvailable")?,
            balloon: field("Balloon")?,
        })
    }

    /// What is not used at all, with what is on the processors' own lists, which MemFree leaves out. Both from
    /// one file: the lists may be emptied at any moment.
    pub fn free(&self) -> Result<Size> {
        self.fold_counters()?;
        let zones = self.read_file("/proc/zoneinfo")?;
        zones
            .lines()
            .filter_map(|line| {
                let line = line.trim_start();
                line.strip_prefix("pages free")
                    .or_else(|| line.strip_prefix("count:"))
            })
            .map(|pages| Ok(self.page_size() * pages.trim().parse()?))
            .sum()
    }

    /// A counter of /proc/vmstat, such as `nr_balloon_pages`.
    pub fn vmstat(&self, name: &str) -> Result<u64> {
        self.fold_counters()?;
        let text = self.read_file("/proc/vmstat")?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line
            .with_context(|| format!("/proc/vmstat has no {name}"))?
            .parse()?)
    }

    /// How much of a NUMA node's memory is in balloons.
    pub fn node_balloon(&self, node: u32) -> Result<Size> {
        self.fold_counters()?;
        let text = self.read_file(&format!("/sys/devices/system/node/node{node}/vmstat"))?;
        let pages = text
            .lines()
            .find_map(|line| line.strip_prefix("nr_balloon_pages "))
            .context("the node does not count the pages in balloons")?;
        Ok(self.page_size() * pages.parse()?)
    }

    /// Has each processor hand in what it has counted for itself, so that sums are exact.
    fn fold_counters(&self) -> Result<()> {
        self.write_file("/proc/sys/vm/stat_refresh", "1")
    }

    /// Runs a program in the guest and returns what it left behind, however it ended.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.output(&self.start(argv, None)?, COMMAND_TIMEOUT)
    }

    /// The same, but the agent kills the program after `timeout`.
    pub fn exec_within(&self, argv: &[&str], timeout: Duration) -> Result<Output> {
        self.output(&self.start(argv, Some(timeout))?, timeout)
    }

    /// Starts a program in the guest; [`Guest::output`] waits for its end. The agent kills it after `timeout`.
    pub fn start(&self, argv: &[&str], timeout: Option<Duration>) -> Result<Pending> {
        let timeout_ms = timeout.map(|timeout| timeout.as_millis().try_into());
        self.home().agent.send(Command::Exec {
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            timeout_ms: timeout_ms.transpose()?,
        })
    }

    /// Waits for the end of a program that has been started.
    pub fn output(&self, pending: &Pending, timeout: Duration) -> Result<Output> {
        // The agent may have to kill the program first; what is added is the time of the answer.
        program_output(self.wait(pending, timeout + Duration::from_secs(10))?)
    }

    /// Runs a program that must succeed, and returns what it wrote to its standard output.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        successful(argv, self.exec(argv)?)
    }

    /// Runs a line of shell that must succeed, and returns what it wrote to its standard output.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.run(&["sh", "-c", line])
    }

    /// Reads a file of the guest.
    pub fn read_file(&self, path: &str) -> Result<String> {
        match self.call(
            Command::ReadFile {
                path: path.to_owned(),
            },
            COMMAND_TIMEOUT,
        )? {
            Reply::Text(text) => Ok(text),
            reply => bail!("the agent answers {reply:?} to a read"),
        }
    }

    /// Writes a file of the guest, in one write.
    pub fn write_file(&self, path: &str, contents: &str) -> Result<()> {
        let (path, contents) = (path.to_owned(), contents.to_owned());
        self.call(Command::WriteFile { path, contents }, COMMAND_TIMEOUT)?;
        Ok(())
    }

    /// Writes a file of the guest, and waits until the kernel announces a change of an attribute in sysfs. Returns what
    /// that says then.
    pub fn watch(&self, attribute: &str, path: &str, contents: &str) -> Result<String> {
        let command = Command::Watch {
            attribute: attribute.to_owned(),
            path: path.to_owned(),
            contents: contents.to_owned(),
            timeout_ms: u64::try_from(COMMAND_TIMEOUT.as_millis() / 2)?,
        };
        match self.call(command, COMMAND_TIMEOUT)? {
            Reply::Text(text) => Ok(text),
            reply => bail!("the agent answers {reply:?} to a watch"),
        }
    }

    /// Starts a load, and waits until it has been through its memory once.
    pub fn load(&self, load: Load) -> Result<RunningLoad<'_>> {
        let load = self.start_load(load)?;
        load.wait_passes(1)?;
        Ok(load)
    }

    /// Starts a load.
    pub fn start_load(&self, load: Load) -> Result<RunningLoad<'_>> {
        match self.call(Command::StartLoad(load), COMMAND_TIMEOUT)? {
            Reply::Load(id) => Ok(RunningLoad { guest: self, id }),
            reply => bail!("the agent answers {reply:?} to a load"),
        }
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

    /// Fails when the guest's kernel has given up.
    pub fn check_alive(&self) -> Result<()> {
        ensure!(
            !self.console.has_panicked(&self.config.expected)?,
            "the guest's kernel panics"
        );
        Ok(())
    }

    /// A load that was started before the guest was hibernated.
    pub fn running(&self, id: LoadId) -> RunningLoad<'_> {
        RunningLoad { guest: self, id }
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

/// What a program left behind.
fn program_output(reply: Reply) -> Result<Output> {
    match reply {
        Reply::Output(output) => Ok(output),
        reply => bail!("the agent answers {reply:?} to a program"),
    }
}

/// What a program that must succeed wrote to its standard output.
fn successful(argv: &[&str], output: Output) -> Result<String> {
    ensure!(
        output.exit == Exit::Status(0),
        "'{}' ends with {:?} in the guest: {}",
        argv.join(" "),
        output.exit,
        output.stderr.trim_end()
    );
    Ok(output.stdout)
}

/// A load that has been started in a guest.
#[derive(Debug)]
pub struct RunningLoad<'a> {
    guest: &'a Guest,
    id: LoadId,
}

impl RunningLoad<'_> {
    /// Its name in the guest.
    pub fn id(&self) -> LoadId {
        self.id
    }

    /// How it fares.
    pub fn status(&self) -> Result<LoadStatus> {
        self.call(Command::LoadStatus(self.id), COMMAND_TIMEOUT)
    }

    /// Waits until it has been through all of its memory `passes` more times, which is where it finds out that
    /// something is not as it was.
    ///
    /// # Errors
    ///
    /// It has failed, or takes too long.
    pub fn verify(&self, passes: u64) -> Result<()> {
        self.wait_passes(self.status()?.progress.passes + passes)
    }

    fn wait_passes(&self, passes: u64) -> Result<()> {
        self.follow(|status| {
            ensure!(
                status.exit.is_none_or(|exit| exit == Exit::Status(0)),
                "a load ends with {:?}: {}",
                status.exit,
                status.stderr.trim_end()
            );
            Ok(status.progress.passes >= passes)
        })?;
        Ok(())
    }

    /// Waits until it has ended by itself or has been killed.
    pub fn wait(&self) -> Result<LoadStatus> {
        self.follow(|status| Ok(status.exit.is_some()))
    }

    /// Waits until `condition` holds, for as long as it makes progress.
    fn follow(&self, condition: impl Fn(&LoadStatus) -> Result<bool>) -> Result<LoadStatus> {
        let mut stopwatch = self.guest.stopwatch();
        let mut last = Progress::default();
        loop {
            let status = self.status()?;
            if condition(&status)? {
                return Ok(status);
            }
            if status.progress != last {
                last = status.progress;
                stopwatch.restart();
            }
            self.guest.check_alive()?;
            ensure!(
                !stopwatch.has_passed(LOAD_TIMEOUT),
                "a load makes no progress for {} s: {last:?}",
                LOAD_TIMEOUT.as_secs()
            );
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Asks it to stop and waits for that.
    ///
    /// # Errors
    ///
    /// It has failed, or has been killed.
    pub fn stop(self) -> Result<LoadStatus> {
        let status = self.call(Command::StopLoad(self.id), COMMAND_TIMEOUT)?;
        ensure!(
            status.exit == Some(Exit::Status(0)),
            "a load ends with {:?}: {}",
            status.exit,
            status.stderr.trim_end()
        );
        Ok(status)
    }

    fn call(&self, command: Command, timeout: Duration) -> Result<LoadStatus> {
        match self.guest.call(command, timeout)? {
            Reply::Status(status) => Ok(status),
            reply => bail!("the agent answers {reply:?} about a load"),
        }
    }
}
