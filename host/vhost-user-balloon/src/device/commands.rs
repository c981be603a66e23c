// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting and host requests.

use std::sync::atomic::Ordering::SeqCst;

use balloon_control::Changes;
use balloon_wire::request::Command;

use super::Device;
use crate::memory::page_map::PageMap;
use crate::queues::hinting::Hints;
use crate::queues::requests::{Requests, TooMany};
use crate::sync::{Guard, lock};
use crate::virtio::kind::Kind;

impl Device {
    /// Changes the command of free page hinting.
    pub fn command<R>(&self, command: impl FnOnce(&mut Hints) -> R) -> R {
        let result = command(&mut self.hints());
        self.notify();
        result
    }

    /// Requests hints, and returns the id of their list.
    pub fn request_hints(&self) -> u64 {
        let pages = lock(&self.work).balloon.no_pages();
        self.command(|hints| hints.start(pages))
    }

    /// Free page hinting.
    pub fn hints(&self) -> Guard<'_, Hints> {
        lock(&self.hints)
    }

    /// The host requests.
    pub fn requests(&self) -> Guard<'_, Requests> {
        lock(&self.requests)
    }

    /// Makes a host request, and returns its id.
    ///
    /// # Errors
    ///
    /// The maximum number of requests is open.
    pub fn request(&self, command: Command) -> Result<u64, TooMany> {
        let pages = match command {
            Command::UnusedSkip(_) => lock(&self.work).balloon.no_pages(),
            _ => PageMap::default(),
        };
        let id = self.requests().begin(command, pages)?;
        self.ask();
        Ok(id)
    }

    /// Cancels a request.
    ///
    /// # Errors
    ///
    /// The maximum number of requests is open.
    pub fn cancel(&self, id: u64) -> Result<(), TooMany> {
        self.requests().cancel(id)?;
        self.ask();
        Ok(())
    }

    /// Makes the worker thread send new requests.
    fn ask(&self) {
        if let Some(number) = Kind::Requests.number(self.acked.load(SeqCst)) {
            self.wake(number);
        }
        self.publish(Changes::info);
    }
}
