// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reasons not to return memory to the host.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use balloon_control::Changes;

use super::state::since_boot;
use super::{Device, Sizes};
use crate::memory::hazard::{Hazard, Identity};
use crate::sync::lock;

impl Device {
    /// Why no memory is returned to the host, except for an `inhibit`.
    pub fn hazards(&self) -> BTreeSet<Hazard> {
        let Sizes { files, hazards, .. } = self.sizes();
        &self.process_hazards(&files) | &hazards
    }

    /// The hazards of processes that use these files of the guest's memory. The check may take long.
    pub(super) fn process_hazards(&self, files: &BTreeSet<Identity>) -> BTreeSet<Hazard> {
        let mut watch = lock(&self.watch);
        let mut hazards = watch.hazards(files, || self.channel.vmm());
        hazards.retain(|hazard| !self.settings.allowed.contains(hazard));
        watch.log(&hazards | &self.sizes().hazards);
        hazards
    }

    /// The remaining time of each owner's `inhibit`.
    pub fn inhibitors(&self) -> BTreeMap<String, Duration> {
        let state = lock(&self.state);
        let inhibitors = state.inhibitors(since_boot());
        inhibitors
            .map(|(owner, rest)| (owner.to_owned(), rest))
            .collect()
    }

    /// The remaining time of the longest `inhibit`.
    pub fn inhibited(&self) -> Option<Duration> {
        lock(&self.state).inhibited(since_boot())
    }

    /// Stops returning memory to the host for so long at least. Other owners may have requested a longer time.
    /// Returns whether there was room for another owner.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and this is lost when the process ends.
    pub fn inhibit(&self, owner: &str, time: Duration) -> io::Result<bool> {
        if !lock(&self.state).inhibit(since_boot(), owner, time) {
            return Ok(false);
        }
        // The worker thread may still discard the memory of its current message.
        drop(lock(&self.work));
        self.publish(Changes::info);
        self.save()?;
        Ok(true)
    }

    /// Ends the `inhibit` of an owner, or of all owners.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and this is lost when the process ends.
    pub fn resume(&self, owner: Option<&str>) -> io::Result<()> {
        lock(&self.state).resume(owner);
        self.publish(Changes::info);
        self.save()
    }
}
