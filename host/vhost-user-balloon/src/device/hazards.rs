// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why memory is not given back to the host.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use super::{Device, Sizes};
use crate::hazard::{Hazard, Identity};
use crate::state::since_boot;
use crate::sync::lock;

impl Device {
    /// Why no memory is given back to the host, apart from what a client has asked for.
    pub fn hazards(&self) -> BTreeSet<Hazard> {
        let Sizes { files, hazards, .. } = self.sizes();
        &self.process_hazards(&files) | &hazards
    }

    /// What processes with these files of the guest's memory do to it that forbids to discard any of it. It may take
    /// long to find out.
    pub(super) fn process_hazards(&self, files: &BTreeSet<Identity>) -> BTreeSet<Hazard> {
        let mut watch = lock(&self.watch);
        let mut hazards = watch.hazards(files, || self.channel.vmm());
        hazards.retain(|hazard| !self.settings.allowed.contains(hazard));
        watch.log(&hazards | &self.sizes().hazards);
        hazards
    }

    /// For how long no memory is given back to the host for each owner that has asked for that.
    pub fn inhibitors(&self) -> BTreeMap<String, Duration> {
        let state = lock(&self.state);
        let inhibitors = state.inhibitors(since_boot());
        inhibitors
            .map(|(owner, rest)| (owner.to_owned(), rest))
            .collect()
    }

    /// For how long a client has had no memory given back to the host.
    pub fn inhibited(&self) -> Option<Duration> {
        lock(&self.state).inhibited(since_boot())
    }

    /// Has no memory given back to the host for so long at least. Other owners may have asked for longer. Returns
    /// whether there was room for another owner.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and this will be forgotten with the process.
    pub fn inhibit(&self, owner: &str, time: Duration) -> io::Result<bool> {
        if !lock(&self.state).inhibit(since_boot(), owner, time) {
            return Ok(false);
        }
        // What the worker is at may still be given back.
        drop(lock(&self.work));
        self.save()?;
        Ok(true)
    }

    /// Has memory given back to the host again, as far as this depends on an owner, or on any.
    ///
    /// # Errors
    ///
    /// The file cannot be written, and this will be forgotten with the process.
    pub fn resume(&self, owner: Option<&str>) -> io::Result<()> {
        lock(&self.state).resume(owner);
        self.save()
    }
}
