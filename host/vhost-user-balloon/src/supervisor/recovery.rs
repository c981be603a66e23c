// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starts workers, detects that one has ended or hangs, and passes the device to the next one.

use std::mem;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use log::error;

use super::Supervisor;
use super::program::SELF;
use super::vmm::Vmm;
use super::worker::Worker;

/// How long a worker runs until its failures are forgotten.
const STEADY: Duration = Duration::from_secs(5);

/// The longest wait before a worker is started after several failures.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How many workers may fail after an update before the supervisor returns to the previous program.
const MAX_FAILURES: u32 = 3;

impl Supervisor {
    /// Handles expired timers.
    pub(super) fn advance(&mut self) -> Result<()> {
        let now = Instant::now();
        self.reap()?;
        self.check_trial();
        if let Some(worker) = &mut self.worker {
            if worker.deadline().is_some_and(|due| now >= due) {
                error!("the worker {} does not respond, and is killed", worker.id());
                worker.kill();
            } else if worker.is_ready() && worker.started().elapsed() >= STEADY {
                // The program works.
                self.failures = 0;
                self.old_program = None;
            }
        }
        if self.worker.is_none() && now >= self.start_at {
            self.start_worker();
        }
        if self.vmm.as_ref().is_some_and(Vmm::is_overdue) {
            error!("the worker does not answer, and is killed");
            self.kill();
        }
        if self.vmm.is_some() && self.backend.is_none() && !self.stopping {
            self.attach_worker();
        }
        if let Some(vmm) = &mut self.vmm {
            vmm.setup.check_queues();
            vmm.setup.check_driver();
        }
        self.probe();
        Ok(())
    }

    fn start_worker(&mut self) {
        self.stopping = false;
        let control = self.control.as_ref().map(|control| &control.listener);
        match Worker::start(Path::new(SELF), &self.arguments, &self.kept, control) {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => {
                error!("{error:#}");
                self.failed();
            }
        }
    }

    /// Sends a request to a worker that has sent nothing for a while, to check that it responds.
    fn probe(&mut self) {
        let (Some(backend), Some(vmm)) = (&self.backend, &mut self.vmm) else {
            return;
        };
        let Some(message) = vmm.probe() else {
            return;
        };
        vmm.expect_answer(None);
        if message.send(backend).is_err() {
            self.on_backend_closed();
        }
    }

    /// Kills a worker that does not respond.
    pub(super) fn kill(&mut self) {
        self.stopping = true;
        if let Some(worker) = &mut self.worker {
            worker.kill();
        }
        self.crashed();
    }

    /// Handles a crash or a hang of the worker.
    fn crashed(&mut self) {
        let guilty = self.vmm.as_mut().and_then(Vmm::crashed);
        self.disconnect();
        if let Some(head) = guilty {
            self.refuse(head);
        }
    }

    /// Handles the end of the worker.
    fn reap(&mut self) -> Result<()> {
        if !mem::take(&mut self.child_ended) {
            return Ok(());
        }
        let Some(status) = self.worker.as_mut().and_then(Worker::status) else {
            return Ok(());
        };
        error!("the worker has ended: {status}");
        // It may have been ready before.
        self.on_worker();
        self.worker = None;
        self.crashed();
        self.failed();
        if !self.is_ready && !self.resumed {
            bail!("the worker does not start");
        }
        if self.failures >= MAX_FAILURES {
            if let Some(old) = self.old_program.take() {
                error!("the new program fails; continuing with the one before it");
                let path = format!("/proc/self/fd/{}", old.as_raw_fd());
                self.replace_program(Path::new(&path), None);
            }
        }
        Ok(())
    }

    /// Counts a failure, and delays the next worker.
    fn failed(&mut self) {
        self.failures += 1;
        let pause = match self.failures {
            1 => Duration::ZERO,
            failures => Duration::from_secs(1 << (failures - 2).min(4)).min(LONGEST_PAUSE),
        };
        self.start_at = Instant::now() + pause;
    }

    /// Connects the worker with the front end, and sends it the journal.
    fn attach_worker(&mut self) {
        let (Some(worker), Some(vmm)) = (&mut self.worker, &mut self.vmm) else {
            return;
        };
        // A worker would refuse the rings. The front end sends their memory next, unless it waits for the worker.
        let has_rings = vmm.journal.has_memory() || vmm.blocked;
        if !worker.is_ready() || !has_rings {
            return;
        }
        let path = self.socket.with_suffix(".worker");
        let attached = worker
            .connect(&path, vmm.pid, vmm.journal.continues())
            .and_then(|backend| vmm.journal.replay(&backend).map(|()| backend));
        match attached {
            Ok(backend) => {
                vmm.blocked = false;
                self.backend = Some(backend);
            }
            Err(error) => {
                error!("the worker cannot continue the device: {error:#}");
                self.kill();
            }
        }
        self.save();
    }

    /// Ends the worker, for another one.
    pub(super) fn stop_worker(&mut self) {
        self.disconnect();
        if let Some(vmm) = &mut self.vmm {
            // The next worker gets the message.
            vmm.pending = None;
        }
        if let Some(mut worker) = self.worker.take() {
            worker.stop();
            worker.wait();
        }
    }

    /// Closes the worker's connection. The worker completes its current messages.
    pub(super) fn disconnect(&mut self) {
        if self.backend.take().is_some() {
            self.absent_since = Instant::now();
        }
    }
}
