// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The schedule of the search for memory of the balloon that the host has allocated again.
//!
//! A VMM stops the queues while it reads all of the guest's memory for a dump, and restarts them where they were. So
//! the search begins when a driver continues, if it notifies the device before it reuses a page.

use std::time::Duration;

use log::info;

use super::Device;
use super::work::Work;
use crate::budget::{BUDGET, Budget};
use crate::memory::sweep::Sweep;
use crate::sync::lock;

/// The time between two turns. It limits the search to half of the worker's time.
const INTERVAL: Duration = BUDGET;

/// The time until the next attempt while no memory may be discarded.
const WITHHELD_INTERVAL: Duration = Duration::from_secs(10);

impl Device {
    /// Begins a search soon.
    pub(super) fn sweep_soon(&self, work: &mut Work) {
        work.sweep = Some(Sweep::default());
        self.sweep.once(INTERVAL);
    }

    /// Continues the search for a bounded time.
    pub(super) fn sweep(&self) {
        // Before the lock, for which the front end may wait.
        let (files, is_hazardous) = self.look_at_processes();
        let mut work = lock(&self.work);
        if !work.at_work || work.sweep.is_none() {
            return;
        }
        let interval = if files != work.balloon.files() {
            INTERVAL
        } else if is_hazardous || self.inhibited().is_some() {
            WITHHELD_INTERVAL
        } else {
            match work.sweep(&self.counters, Budget::turn()) {
                None => INTERVAL,
                Some(0) => return,
                Some(bytes) => {
                    return info!(
                        "the host had allocated {} KiB of the balloon again, as for a dump of the VM; they are \
                         returned",
                        bytes >> 10
                    );
                }
            }
        };
        drop(work);
        self.sweep.once(interval);
    }
}
