// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU process.

use std::fs::{self, File};
use std::io::stderr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use procfs::process::{MemoryMap, Process};

use crate::config::Config;
use crate::config::command_line::{AGENT_FD, QMP_FD};
use crate::size::Size;
use crate::stopwatch::Stopwatch;

/// A running QEMU. It is killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Mutex<Child>,
    messages: PathBuf,
}

/// The host's ends of the streams into a QEMU.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) qmp: UnixStream,
    pub(crate) agent: UnixStream,
}

impl Qemu {
    /// Starts it; `daemon` is the socket of the balloon's daemon, if there is one.
    pub(crate) fn start(config: &Config, daemon: Option<&Path>) -> Result<(Self, Streams)> {
        let messages = config.messages();
        let (qmp, qmp_end) = UnixStream::pair()?;
        let (agent, agent_end) = UnixStream::pair()?;

        let program = &config.artifacts.qemu;
        let mut command = Command::new(program);
        command
            .args(config.command_line(daemon))
            .stdin(Stdio::null())
            .stdout(if config.verbose {
                stderr().into()
            } else {
                Stdio::null()
            })
            .stderr(File::options().append(true).open(&messages)?)
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: OwnedFd::from(qmp_end),
                    child_fd: QMP_FD,
                },
                FdMapping {
                    parent_fd: OwnedFd::from(agent_end),
                    child_fd: AGENT_FD,
                },
            ])?;
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let qemu = Self {
            child: Mutex::new(child),
            messages,
        };
        Ok((qemu, Streams { qmp, agent }))
    }

    /// Waits until QEMU has ended by itself, and returns whether it did.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<bool> {
        let stopwatch = Stopwatch::start(self.id());
        loop {
            let is_over = stopwatch.has_passed(timeout);
            if let Some(status) = self.child().try_wait()? {
                if !status.success() {
                    bail!(
                        "QEMU failed: {}; its messages are in {}",
                        self.complaint(),
                        self.messages.display()
                    );
                }
                return Ok(true);
            }
            if is_over {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The last output of QEMU.
    pub(crate) fn complaint(&self) -> String {
        let messages = fs::read_to_string(&self.messages).unwrap_or_default();
        messages
            .lines()
            .last()
            .unwrap_or("it gave no reason")
            .to_owned()
    }

    /// How much of the host's memory QEMU has in use.
    pub(crate) fn resident(&self) -> Result<Size> {
        let kib = self.process()?.status()?.vmrss;
        Ok(Size::kib(kib.context("QEMU has ended")?))
    }

    /// How much of the mapping with exactly the size of the guest's `memory` is in transparent huge
    /// pages.
    pub(crate) fn transparent_huge_pages(&self, memory: Size) -> Result<Size> {
        let maps = self.process()?.smaps()?;
        let size = |map: &MemoryMap| Size::bytes(map.address.1 - map.address.0);
        let mapping = maps.iter().find(|map| size(map) == memory);
        let huge = mapping.and_then(|map| map.extension.map.get("AnonHugePages"));
        let bytes = huge.context("QEMU has no mapping of the guest's memory")?;
        Ok(Size::bytes(*bytes))
    }

    fn process(&self) -> Result<Process> {
        Ok(Process::new(self.id().try_into()?)?)
    }

    /// The number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child().id()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect("a lock")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}
