// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When the balloon is looked through for memory that the host has allocated again.
//!
//! A VMM stops the queues while it reads all of the guest's memory, for a dump or a snapshot, and starts them again
//! where they were. So the worker looks when a driver continues that tells before it uses a page of the balloon again.

use std::time::Duration;

use log::info;

use super::Device;
use crate::queue::{BUDGET, Budget};
use crate::sweep::Sweep;
use crate::sync::lock;
use crate::work::Work;

/// How long the worker does something else between two turns, so that it spends half of its time on this at most.
const INTERVAL: Duration = BUDGET;

/// How long it waits while no memory may be given back.
const WITHHELD_INTERVAL: Duration = Duration::from_secs(10);

impl Device {
    /// Has the balloon looked through soon.
    pub(super) fn sweep_soon(&self, work: &mut Work) {
        work.sweep = Some(Sweep::default());
        self.sweep.once(INTERVAL);
    }

    /// Looks through the balloon for a bounded time.
    pub(super) fn sweep(&self) {
        // The front end must not wait for the lock below while processes are looked at.
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
                        "the host had allocated {} KiB of the balloon again, as for a dump of the VM; they are given \
                         back",
                        bytes >> 10
                    );
                }
            }
        };
        drop(work);
        self.sweep.once(interval);
    }
}
