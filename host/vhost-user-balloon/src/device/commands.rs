// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the host asks the guest for by free page hinting and host requests.

use std::sync::atomic::Ordering::SeqCst;

use balloon_wire::request::Command;

use super::Device;
use crate::hinting::Hints;
use crate::kind::Kind;
use crate::page_map::PageMap;
use crate::requests::{Requests, TooMany};
use crate::sync::{Guard, lock};

impl Device {
    /// Changes the command of free page hinting.
    pub fn command(&self, command: impl FnOnce(&mut Hints)) {
        command(&mut lock(&self.hints));
        self.notify();
    }

    /// What the guest is asked for.
    pub fn requests(&self) -> Guard<'_, Requests> {
        lock(&self.requests)
    }

    /// Asks the guest for something, and returns the id of the request.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn request(&self, command: Command) -> Result<u64, TooMany> {
        let pages = match command {
            Command::UnusedSkip(_) => lock(&self.work).balloon.no_pages(),
            _ => PageMap::default(),
        };
        let id = self.requests().begin(command, pages)?;
        self.ask();
        Ok(id)
    }

    /// Tells the guest that an answer is no longer wanted.
    ///
    /// # Errors
    ///
    /// There are as many open requests as can be.
    pub fn cancel(&self, id: u64) -> Result<(), TooMany> {
        self.requests().cancel(id)?;
        self.ask();
        Ok(())
    }

    /// Has the worker ask the guest what there is to ask.
    fn ask(&self) {
        if let Some(number) = Kind::Requests.number(self.acked.load(SeqCst)) {
            self.wake(number);
        }
    }
}
