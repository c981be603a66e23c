// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hostile balloon device, which is plugged into a running guest.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::device::vhost_user_balloon;
use crate::guest::Guest;
use crate::stopwatch::{PATIENCE, Stopwatch};

/// How often the time limit is checked.
const INTERVAL: Duration = Duration::from_millis(100);

/// Its line when it has done its part.
const OVER: &str = "over";

/// How the device is connected with its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The process is the back end of QEMU's vhost-user device.
    VhostUser,
    /// The process is a whole PCI device, over vfio-user.
    VfioUser,
}

/// A hostile device in a process of its own, which is killed when this is dropped.
#[derive(Debug)]
pub struct Hostile {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    link: Link,
    seed: u64,
    /// QEMU's options for the device.
    properties: Value,
    directory: TempDir,
}

impl Hostile {
    /// Starts the device of `seed` with some more arguments. It logs its actions to `hostile.log`,
    /// next to the guest's logs.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub fn start(guest: &Guest, link: Link, seed: u64, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let log = guest.config().logs().join("hostile.log");
        let mut child = Command::new(guest.config().tool("hostile-balloon"))
            .arg("--socket")
            .arg(directory.path().join("socket"))
            .args(["--seed", &seed.to_string()])
            .args((link == Link::VfioUser).then_some("--pci"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(log)?)
            .spawn()
            .context("starting the hostile device")?;
        let stdin = child.stdin.take().context("its input is a pipe")?;
        let stdout = child.stdout.take().context("its output is a pipe")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The receiver is gone after a timeout.
                let _ = sender.send(line);
            }
        });
        let mut hostile = Self {
            child,
            stdin,
            lines,
            link,
            seed,
            properties: Value::Null,
            directory,
        };
        hostile.properties = serde_json::from_str(&hostile.line()?)?;
        Ok(hostile)
    }

    /// Plugs it into `bus`, as `balloon0`.
    pub fn plug(&self, guest: &Guest, bus: &str) -> Result<()> {
        let socket = self.directory.path().join("socket");
        let mut device = match self.link {
            Link::VhostUser => {
                let id = self.chardev();
                guest.connect(&id, &socket)?;
                vhost_user_balloon("pci", &id, &self.properties)
            }
            Link::VfioUser => json!({
                "driver": "vfio-user-pci",
                "id": "balloon0",
                "socket": { "type": "unix", "path": socket },
            }),
        };
        device["bus"] = json!(bus);
        guest.qmp().execute::<Value>("device_add", &device)?;
        Ok(())
    }

    /// Sends a line to its standard input.
    pub(crate) fn send(&self, line: &str) -> Result<()> {
        writeln!(&self.stdin, "{line}").context("the device does not read")
    }

    /// The next line of its standard output.
    pub(crate) fn line(&self) -> Result<String> {
        let line = self.line_within(&Stopwatch::start(self.child.id()), PATIENCE)?;
        line.with_context(|| {
            let (seed, limit) = (self.seed, PATIENCE.as_secs());
            format!("the hostile device of seed {seed} prints no line for {limit} s")
        })
    }

    /// The next line, or none if it does not come within `limit`.
    fn line_within(&self, stopwatch: &Stopwatch, limit: Duration) -> Result<Option<String>> {
        loop {
            let is_over = stopwatch.has_passed(limit);
            match self.lines.recv_timeout(INTERVAL) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Timeout) if is_over => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the hostile device of seed {} ends", self.seed)
                }
            }
        }
    }

    /// A line that it has already printed.
    pub(crate) fn printed(&self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    fn chardev(&self) -> String {
        format!("hostile{}", self.seed)
    }

    /// Waits until it has finished its actions on the driver and is ready for its end.
    pub fn wait(&self, guest: &Guest) -> Result<()> {
        let has_driver = self.wait_within(guest, PATIENCE)?;
        ensure!(has_driver, "no driver binds to the hostile device");
        Ok(())
    }

    /// The same. Returns false if no driver has bound to it while the guest could run for `limit`.
    pub fn wait_within(&self, guest: &Guest, limit: Duration) -> Result<bool> {
        let line = match self.line_within(&guest.stopwatch(), limit)? {
            Some(line) => line,
            None => {
                self.send("")?;
                self.line()?
            }
        };
        Ok(line == OVER)
    }

    /// Ends the time in which the device behaves well, if its behaviour is such, and waits for that.
    pub fn turn(&self) -> Result<()> {
        self.send("")?;
        self.line().map(drop)
    }

    /// Removes its chardev from QEMU, after it was unplugged.
    pub fn forget(self, guest: &Guest) -> Result<()> {
        match self.link {
            Link::VhostUser => guest.disconnect(&self.chardev()),
            Link::VfioUser => Ok(()),
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
