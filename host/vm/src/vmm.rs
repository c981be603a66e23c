// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon device of another VMM, which is plugged into a running guest: `hostile-balloon --vmm`.

use std::collections::BTreeMap;

use anyhow::{Context, Error, Result, anyhow};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::hostile::{Hostile, Link};
use crate::size::Size;
use crate::stopwatch::PATIENCE;

/// What the device has seen of its driver.
#[derive(Clone, Debug, Deserialize)]
pub struct VmmSeen {
    /// Whether a driver uses the device.
    pub active: bool,
    /// The balloon's size that the driver has written, in balloon pages.
    pub actual: u64,
    /// How many messages there were.
    pub messages: u64,
    /// How many pages were inflated.
    pub inflated: u64,
    /// How many pages were deflated.
    pub deflated: u64,
    /// The hinted memory that the device has discarded, in bytes.
    pub hinted: u64,
    /// The reported memory that the device has discarded, in bytes.
    pub reported: u64,
    /// How often the driver has sent statistics since it was bound.
    pub samples: u64,
    /// The latest statistics, by their tags.
    pub statistics: BTreeMap<u16, u64>,
    /// The device's command about hints.
    pub host_hint: u32,
    /// The driver's command about hints.
    pub guest_hint: Option<u32>,
}

/// A device in a process of its own. It ends at the first thing that the VMM does not accept.
#[derive(Debug)]
pub struct Vmm<'a> {
    guest: &'a Guest,
    device: Hostile,
}

impl<'a> Vmm<'a> {
    /// Plugs the device of the VMM with this name into `bus`, as `balloon0`, and waits for its driver.
    ///
    /// # Errors
    ///
    /// It has no driver in time, or the driver does what the VMM does not accept.
    pub fn plug(guest: &'a Guest, name: &str, bus: &str) -> Result<Self> {
        let device = Hostile::start(guest, Link::VfioUser, 0, &["--vmm", name])?;
        device.plug(guest, bus)?;
        let vmm = Self { guest, device };
        vmm.wait("a driver for the device", |seen| seen.active)?;
        Ok(vmm)
    }

    /// What the device has seen of its driver.
    pub fn seen(&self) -> Result<VmmSeen> {
        self.order(&json!("show"))
    }

    /// Waits until the device has seen what `condition` is about.
    pub fn wait(&self, what: &str, condition: impl Fn(&VmmSeen) -> bool) -> Result<VmmSeen> {
        let mut last = None;
        let waited = self.guest.wait_until(what, PATIENCE, || {
            let seen = self.seen()?;
            let holds = condition(&seen);
            last = Some(seen);
            Ok(holds)
        });
        waited.map_err(|error| anyhow!("{error:#} (the device has seen {last:?})"))?;
        last.context("the device was asked")
    }

    /// Sets the target, and does not wait for the guest.
    pub fn request(&self, size: Size) -> Result<()> {
        self.order(&json!({ "target": size.as_pages() })).map(drop)
    }

    /// Sets the target, and waits until the driver has written that size.
    pub fn settle(&self, size: Size) -> Result<()> {
        self.request(size)?;
        self.reach(size)
    }

    /// Waits until the driver has written this size.
    pub fn reach(&self, size: Size) -> Result<()> {
        let what = format!("a balloon of {size}");
        self.wait(&what, |seen| seen.actual == size.as_pages())
            .map(drop)
    }

    /// Requests statistics, and waits for them.
    pub fn statistics(&self) -> Result<BTreeMap<u16, u64>> {
        // The first buffer of a driver has no request.
        let before = self.wait("a buffer for statistics", |seen| seen.samples > 0)?;
        self.order(&json!("statistics"))?;
        let seen = self.wait("statistics", |seen| seen.samples > before.samples)?;
        Ok(seen.statistics)
    }

    /// Begins a round of hints. The device ends it as soon as the driver has, if `ends_itself` says so.
    pub fn hint(&self, ends_itself: bool) -> Result<()> {
        self.order(&json!({ "hint": ends_itself })).map(drop)
    }

    /// Ends the round of hints.
    pub fn end_hints(&self) -> Result<()> {
        self.order(&json!("end-hints")).map(drop)
    }

    /// Adds to an error what the device has not accepted.
    pub fn explain(&self, error: Error) -> Error {
        while let Some(line) = self.device.printed() {
            if let Some(text) = rejection(&line) {
                return error.context(text);
            }
        }
        error
    }

    fn order(&self, order: &Value) -> Result<VmmSeen> {
        // A device that has ended does not read, and its last line says why.
        let sent = self.device.send(&order.to_string());
        let line = self.device.line().or_else(|error| sent.and(Err(error)))?;
        match rejection(&line) {
            Some(text) => Err(anyhow!(text)),
            None => serde_json::from_str(&line).with_context(|| line.clone()),
        }
    }
}

/// What the device has not accepted, if this line says so.
fn rejection(line: &str) -> Option<String> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some(value["rejected"].as_str()?.to_owned())
}
