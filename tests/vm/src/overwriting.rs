// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Overwrites memory that a guest lists for a copy that leaves it out.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use balloon_control::{Begun, HintAction, Ranges, Request};
use fastrand::Rng;
use serde_json::{Value, json};
use vm::{Config, Daemon, Driver, Guest, Load, Size, WriteLog};

use crate::scenario::{PATIENCE, Setup};

/// The value that overwrites memory.
const GARBAGE: u8 = 0xa5;

/// Errors by which a guest shows that its data are corrupted: of a process that reads the value, and of the kernel.
const CORRUPTION: [&str; 6] = [
    "a5a5a5a5",
    "general protection fault",
    "kernel NULL pointer dereference",
    "unable to handle page fault",
    "Oops",
    "Bad page",
];

/// How the host asks for a list of memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    /// A request for unused memory.
    Unused,
    /// Free page hints.
    Hints,
}

impl List {
    fn request(self) -> Request {
        match self {
            Self::Unused => unused(4096),
            Self::Hints => Request::Hints {
                action: HintAction::Start,
            },
        }
    }

    /// Allows the guest to use memory again that it keeps for the list.
    fn give_back(self, daemon: &Daemon) -> Result<()> {
        if self == Self::Hints {
            daemon.call::<Value>(&Request::Hints {
                action: HintAction::Done,
            })?;
        }
        Ok(())
    }
}

/// A guest that lists memory, and how often.
pub(crate) struct Overwriting {
    pub(crate) list: List,
    pub(crate) config: Config,
    pub(crate) memory: Size,
    pub(crate) rounds: u64,
    pub(crate) seed: u64,
}

impl Overwriting {
    /// Overwrites the memory that the driver lists and that was not written since. Meanwhile, processes of the guest
    /// allocate, verify and free memory of all kinds, the balloon inflates and deflates, and memory is compacted. Adds
    /// the amount of overwritten memory to `total`.
    ///
    /// # Errors
    ///
    /// A process of the guest has detected corrupted data.
    pub(crate) fn run(&self, driver: Driver, total: &mut Size) -> Result<()> {
        let log = WriteLog::new()?;
        let config = self.config.clone().memory(self.memory).write_log(&log);
        let mut random = Rng::with_seed(self.seed);
        vm::run(&config, |guest| {
            guest.insmod(driver, &[])?;
            let load = guest.load(Load::Churn {
                mib: usize::try_from(self.memory.as_mib() / 4)?,
                threads: 4,
                seed: random.u64(..),
            })?;
            load.verify(100)?;
            for _ in 0..self.rounds {
                self.overwrite(guest, &log, &mut random, total)?;
                load.verify(50)?;
            }
            guest.balloon().settle(Size::default())?;
            load.stop()?;
            guest.rmmod(driver)
        })
    }

    /// The same with a driver that lists memory in use.
    ///
    /// # Errors
    ///
    /// No process of the guest has detected corrupted data.
    pub(crate) fn detects_lie(&self, setup: &Setup) -> Result<()> {
        let mut total = Size::default();
        let outcome = self.run(Driver::Lying, &mut total);
        match outcome {
            Ok(()) => bail!(
                "{total} were overwritten, some of it in use, and the corruption was not detected"
            ),
            Err(error) if total == Size::default() => Err(error.context("nothing was overwritten")),
            Err(error)
                if CORRUPTION
                    .iter()
                    .any(|sign| format!("{error:#}").contains(sign)) =>
            {
                let first = error.to_string();
                let first = first.lines().next().unwrap_or_default();
                setup.note(format!("detected after {total}: {first}"));
                Ok(())
            }
            Err(error) => Err(error.context("the guest fails, but not by corrupted data")),
        }
    }

    /// Asks for one list, and overwrites the memory that it allows.
    fn overwrite(
        &self,
        guest: &Guest,
        log: &WriteLog,
        random: &mut Rng,
        total: &mut Size,
    ) -> Result<()> {
        let daemon = guest.daemon()?;
        let pause = Duration::from_millis(random.u64(0..300));
        let size = Size::mib(random.u64(0..self.memory.as_mib() / 3));
        // The log starts before the request. The guest is stopped, so it cannot receive the request
        // earlier.
        stop(guest)?;
        log.clear()?;
        resume(guest, &daemon)?;
        let begun: Begun = daemon.call(&self.list.request())?;
        guest.balloon().request(size)?;
        guest.write_file("/proc/sys/vm/compact_memory", "1")?;
        guest.complete(&daemon, begun)?;
        let listed = read(&daemon, begun)?;
        if random.bool() {
            self.list.give_back(&daemon)?;
        }
        // Some of the memory is in use by now.
        thread::sleep(pause);

        stop(guest)?;
        fill_unwritten(guest, &log.read()?, listed, total)?;
        resume(guest, &daemon)?;
        self.list.give_back(&daemon)
    }
}

/// Continues the VM, and waits until its device is at work.
fn resume(guest: &Guest, daemon: &Daemon) -> Result<()> {
    go_on(guest)?;
    guest.wait_until("the device responds again", PATIENCE, || {
        Ok(daemon.info()?.guest.driver)
    })
}

/// Reads a list: addresses, and numbers of bytes.
fn read(daemon: &Daemon, begun: Begun) -> Result<Vec<(u64, u64)>> {
    let mut listed = Vec::new();
    let mut from = Some(0);
    while let Some(address) = from {
        let ranges: Ranges = daemon.call(&Request::Ranges {
            id: begun.id,
            from: address,
        })?;
        listed.extend(ranges.ranges);
        from = ranges.next;
    }
    Ok(listed)
}

/// Overwrites the listed memory of a guest that is stopped, except pages in the log.
fn fill_unwritten(
    guest: &Guest,
    written: &[u8],
    listed: Vec<(u64, u64)>,
    total: &mut Size,
) -> Result<()> {
    let file = guest.memory_file()?;
    for (address, bytes) in listed {
        let range = address / 4096..(address + bytes) / 4096;
        let is_written = |page: u64| -> Result<bool> {
            Ok(written[usize::try_from(page / 8)?] & (1 << (page % 8)) != 0)
        };
        let mut first = range.start;
        while first < range.end {
            let mut end = first;
            while end < range.end && !is_written(end)? {
                end += 1;
            }
            if end > first {
                file.fill(Size::pages(first), Size::pages(end - first), GARBAGE)?;
                *total = *total + Size::pages(end - first);
            }
            first = end + 1;
        }
    }
    Ok(())
}

/// All memory, in blocks of `block` bytes or more.
pub(crate) fn unused(block: u64) -> Request {
    Request::Unused {
        block,
        start: 0,
        end: 0,
    }
}

/// Stops the VM.
pub(crate) fn stop(guest: &Guest) -> Result<()> {
    guest.qmp().execute::<Value>("stop", &json!({}))?;
    Ok(())
}

/// Continues it.
pub(crate) fn go_on(guest: &Guest) -> Result<()> {
    guest.qmp().execute::<Value>("cont", &json!({}))?;
    Ok(())
}
