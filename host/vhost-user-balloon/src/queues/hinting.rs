// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting (specification, clause 5.5.6.5).
//!
//! The host has a command id in the configuration space. The guest sends the id, then buffers of memory
//! that was free, then the id that stands for the end.
//!
//! The device never returns hinted memory to the host. The guest may use the memory again at any time,
//! even before the device has seen the hint, and would lose its data. A hint only allows a copy to omit
//! the content from before the command, if the copying program knows all writes since then. Such a program reads the
//! list of hinted memory over the control socket.

use std::time::SystemTime;

use balloon_control::{Progress as Listing, Ranges, RequestStatus};
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::requests::ranges;
use super::virtqueue::{Chain, Progress, Receiver, buffers, read};
use crate::budget::Budget;
use crate::counters::{Counters, Refusal};
use crate::memory::page_map::PageMap;
use crate::sync::{Mutex, lock};

const STOP: u32 = VIRTIO_BALLOON_CMD_ID_STOP;
const DONE: u32 = VIRTIO_BALLOON_CMD_ID_DONE;

/// The command, and the guest's progress with it.
#[derive(Debug)]
pub struct Hints {
    /// The id in the configuration space.
    command: u32,
    /// The last assigned id.
    last: u32,
    /// The id of the command that the guest is answering.
    open: Option<u32>,
    /// The list of the last command that requested hints.
    list: Option<List>,
}

/// The memory that the guest has hinted for a command.
#[derive(Debug)]
struct List {
    progress: Listing,
    pages: PageMap,
}

impl Default for Hints {
    /// The guest may still know the ids of an earlier worker, and ignores an id that it knows. Ids start from the
    /// clock's milliseconds: no worker issues a thousand ids a second.
    fn default() -> Self {
        let milliseconds = SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_millis();
        Self {
            command: DONE,
            last: u32::try_from(milliseconds & u128::from(u32::MAX)).unwrap_or(DONE),
            open: None,
            list: None,
        }
    }
}

impl Hints {
    /// The id in the configuration space.
    pub fn command(&self) -> u32 {
        self.command
    }

    /// Requests hints with a new id, which it returns. An id is not reused while the guest may be answering it. `pages`
    /// stores the hinted pages.
    pub fn start(&mut self, pages: PageMap) -> u64 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != STOP && self.last != DONE && self.open != Some(self.last) {
                break;
            }
        }
        self.command = self.last;
        let progress = Listing {
            id: self.last.into(),
            status: RequestStatus::Waiting,
            named: 0,
            discarded: 0,
        };
        self.list = Some(List { progress, pages });
        progress.id
    }

    /// Stops the hints. The guest keeps the hinted memory.
    pub fn stop(&mut self) {
        self.command = STOP;
        self.end(RequestStatus::Cancelled);
    }

    /// Allows the guest to use the hinted memory again.
    pub fn done(&mut self) {
        self.command = DONE;
        self.end(RequestStatus::Cancelled);
    }

    /// Resets the state for a new driver, which knows no command.
    pub fn restart(&mut self) {
        self.disconnect();
        self.done();
        self.open = None;
    }

    /// Ends the list, since the guest is gone.
    pub fn disconnect(&mut self) {
        self.end(RequestStatus::Reset);
    }

    /// Ends the list with a status, unless it has ended.
    fn end(&mut self, status: RequestStatus) {
        let list = self.list.as_mut();
        if let Some(list) = list.filter(|list| !list.progress.status.is_end()) {
            list.progress.status = status;
            if status == RequestStatus::Reset {
                // The listed memory must not be left out of a copy any more.
                list.pages = PageMap::default();
            }
        }
    }

    /// The list with this id.
    fn list(&self, id: u64) -> Option<&List> {
        self.list.as_ref().filter(|list| list.progress.id == id)
    }

    /// The progress of a list.
    pub fn progress(&self, id: u64) -> Option<Listing> {
        self.list(id).map(|list| list.progress)
    }

    /// The hinted memory, from an address on.
    pub fn ranges(&self, id: u64, from: u64) -> Option<Ranges> {
        self.list(id).map(|list| ranges(id, &list.pages, from))
    }

    /// Handles the id of the command that the guest answers, or the end of its hints. The id of the
    /// configuration space without a command is not valid here.
    fn announce(&mut self, id: u32) {
        self.open = (id != STOP && id != DONE).then_some(id);
        let is_answer = self.open == Some(self.command);
        if let Some(List { progress, .. }) = &mut self.list {
            progress.status = match progress.status {
                RequestStatus::Waiting if is_answer => RequestStatus::Open,
                RequestStatus::Open if !is_answer => RequestStatus::Complete,
                status => status,
            };
        }
    }

    /// Adds the whole pages of a hint in the guest's memory, if the list has not ended.
    fn add(&mut self, start: u64, bytes: u64) {
        let list = self.list.as_mut();
        if let Some(list) = list.filter(|list| list.progress.status == RequestStatus::Open) {
            let end = start.saturating_add(bytes) / BALLOON_PAGE_SIZE;
            let added = list.pages.add(&(start.div_ceil(BALLOON_PAGE_SIZE)..end));
            list.progress.named += added.new * BALLOON_PAGE_SIZE;
        }
    }
}

/// The receiver of the hinting queue.
#[derive(Debug)]
pub struct Hinting<'a> {
    /// The guest's memory, which contains the messages.
    pub memory: &'a GuestMemoryMmap,
    /// The hinted memory.
    pub hints: &'a Mutex<Hints>,
    /// The counters.
    pub counters: &'a Counters,
    /// The time limit of the turn.
    pub budget: Budget,
}

impl Hinting<'_> {
    fn hint(&mut self, chain: Chain<'_>) -> Result<(), Refusal> {
        let mut id = Vec::new();
        read(self.memory, chain.clone(), size_of::<u32>(), &mut id)?;
        // Locked for one message only, since reads of the configuration space need the command.
        let mut hints = lock(self.hints);
        match <[u8; 4]>::try_from(id.as_slice()) {
            Ok(id) => hints.announce(u32::from_le_bytes(id)),
            Err(_) if !id.is_empty() => return Err(Refusal::Truncated),
            Err(_) => {}
        }
        let mut result = Ok(());
        // A message that lists memory repeatedly takes no more time than one that lists all memory once.
        let mut room = self.memory.last_addr().0;
        let whole = buffers(chain, |descriptor| {
            if !descriptor.is_write_only() {
                return;
            }
            if hints.open != Some(hints.command) {
                result = Err(Refusal::StaleHint);
                return;
            }
            let length = descriptor.len();
            let inside = usize::try_from(length)
                .is_ok_and(|length| self.memory.check_range(descriptor.addr(), length));
            if !inside || length == 0 {
                result = Err(Refusal::OutsideMemory);
            } else if let Some(rest) = room.checked_sub(length.into()) {
                room = rest;
                self.counters.hinted.add(length.into());
                hints.add(descriptor.addr().0, length.into());
            } else {
                result = Err(Refusal::TooLong);
            }
        });
        result.and(whole)
    }
}

impl Receiver for Hinting<'_> {
    fn take(&mut self, chain: Chain<'_>, _again: bool) -> bool {
        if let Err(reason) = self.hint(chain) {
            self.counters.refuse(reason);
        }
        !self.budget.is_over()
    }

    fn finish(&mut self, _done: &mut u64, _budget: Budget) -> Progress {
        Progress::Done
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::sync::Level;
    use crate::testing::GuestQueue;

    fn run(guest: &GuestQueue, hints: &mut Hints) -> Counters {
        run_for(guest, hints, Budget::turn())
    }

    fn run_for(guest: &GuestQueue, hints: &mut Hints, budget: Budget) -> Counters {
        let counters = Counters::default();
        let shared = Mutex::new(Level::Short, std::mem::take(hints));
        let mut receiver = Hinting {
            memory: &guest.memory,
            hints: &shared,
            counters: &counters,
            budget,
        };
        guest.serve(&counters, &mut receiver);
        *hints = std::mem::take(&mut lock(&shared));
        counters
    }

    /// An empty list for the guest's memory.
    fn memory() -> PageMap {
        PageMap::new(std::iter::once(0..16 << 8))
    }

    #[test]
    fn a_list_has_the_whole_pages_of_one_command() {
        use RequestStatus::{Cancelled, Complete, Open, Reset, Waiting};
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        let first = hints.start(memory());
        let state = |hints: &Hints, id| {
            let progress = hints.progress(id).unwrap();
            let ranges = hints.ranges(id, 0).unwrap();
            assert_eq!((ranges.end, ranges.next), (16 << 20, None));
            (progress.status, progress.named, ranges.ranges)
        };
        // The end of an earlier command.
        guest.send(&[&STOP.to_le_bytes()]);
        run(&guest, &mut hints);
        assert_eq!(state(&hints, first), (Waiting, 0, vec![]));
        guest.send(&[&hints.command().to_le_bytes()]);
        guest.send_writable(&[(1 << 20, 4096), ((2 << 20) - 1, 8193)]);
        guest.send_writable(&[(1 << 20, 4096), (3 << 20, 4095)]);
        run(&guest, &mut hints);
        let pages = vec![(1 << 20, 4096), (2 << 20, 8192)];
        assert_eq!(state(&hints, first), (Open, 3 * 4096, pages.clone()));
        guest.send(&[&STOP.to_le_bytes()]);
        run(&guest, &mut hints);
        hints.done();
        assert_eq!(state(&hints, first), (Complete, 3 * 4096, pages));

        let second = hints.start(memory());
        assert_eq!(hints.progress(first), None);
        assert_eq!(state(&hints, second), (Waiting, 0, vec![]));
        hints.stop();
        hints.restart();
        assert_eq!(state(&hints, second).0, Cancelled);
        let third = hints.start(memory());
        hints.restart();
        assert_eq!(hints.progress(third).unwrap().status, Reset);
        assert_eq!(hints.ranges(third, 0).unwrap().ranges, []);
    }

    #[test]
    fn a_spent_budget_ends_the_turn_after_each_message() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        hints.start(memory());
        guest.send(&[&hints.command().to_le_bytes()]);
        for _ in 0..3 {
            guest.send_writable(&[(1 << 20, 4096)]);
        }
        for used in 1..=4 {
            run_for(&guest, &mut hints, Budget::spent());
            assert_eq!(guest.used(), used);
        }
    }

    #[test]
    fn a_message_does_not_list_more_than_all_memory() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        let list = hints.start(memory());
        guest.send(&[&hints.command().to_le_bytes()]);
        guest.send_writable(&[(0, 12 << 20), (0, 12 << 20)]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.refused(Refusal::TooLong), 1);
        assert_eq!(hints.progress(list).unwrap().named, 12 << 20);
    }

    #[test]
    fn a_list_that_has_ended_stays_as_it_is() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        let list = hints.start(memory());
        for end in [hints.command(), STOP, hints.command()] {
            guest.send(&[&end.to_le_bytes()]);
        }
        guest.send_writable(&[(1 << 20, 4096)]);
        run(&guest, &mut hints);
        assert_eq!(
            hints.progress(list).unwrap().status,
            RequestStatus::Complete
        );
        assert_eq!(hints.ranges(list, 0).unwrap().ranges, []);
    }

    #[test]
    fn a_new_worker_does_not_repeat_ids() {
        let mut first = Hints::default();
        let ids = [(); 3].map(|()| {
            first.start(PageMap::default());
            first.command()
        });
        thread::sleep(Duration::from_millis(10));
        let mut second = Hints::default();
        second.start(PageMap::default());
        assert!(!ids.contains(&second.command()), "{ids:?}");
    }

    #[test]
    fn hints_belong_to_their_command() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        hints.start(memory());
        let id = hints.command();
        guest.send(&[&id.to_le_bytes()]);
        guest.send_writable(&[(1 << 20, 4096), (2 << 20, 8192)]);
        guest.send_writable(&[(1 << 20, 4096)]);
        guest.send(&[&STOP.to_le_bytes()]);
        guest.send_writable(&[(3 << 20, 4096)]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.hinted.get(), 4 * 4096);
        assert_eq!(counters.refused(Refusal::StaleHint), 1);
        assert_eq!(guest.used(), 5);

        hints.start(memory());
        guest.send(&[&id.to_le_bytes()]);
        guest.send_writable(&[(1 << 20, 4096)]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.hinted.get(), 0);
        assert_eq!(counters.refused(Refusal::StaleHint), 1);
    }

    #[test]
    fn what_stands_for_no_command_has_no_hints() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        for id in [DONE, STOP] {
            guest.send(&[&id.to_le_bytes()]);
            guest.send_writable(&[(1 << 20, 4096)]);
            let counters = run(&guest, &mut hints);
            assert_eq!(counters.hinted.get(), 0);
            assert_eq!(counters.refused(Refusal::StaleHint), 1);
            hints.stop();
        }
    }

    #[test]
    fn hints_outside_memory_are_refused() {
        let mut guest = GuestQueue::new();
        let mut hints = Hints::default();
        hints.start(memory());
        guest.send(&[&hints.command().to_le_bytes()]);
        guest.send_writable(&[((16 << 20) - 4096, 8192)]);
        guest.send(&[b"ab"]);
        let counters = run(&guest, &mut hints);
        assert_eq!(counters.refused(Refusal::OutsideMemory), 1);
        assert_eq!(counters.refused(Refusal::Truncated), 1);
        assert_eq!(counters.hinted.get(), 0);
    }

    #[test]
    fn ids_skip_what_stands_for_something_else() {
        let mut hints = Hints {
            last: u32::MAX - 1,
            open: Some(2),
            ..Hints::default()
        };
        hints.start(PageMap::default());
        assert_eq!(hints.command(), u32::MAX);
        hints.start(PageMap::default());
        assert_eq!(hints.command(), 3);
        hints.stop();
        assert_eq!(hints.command(), STOP);
        hints.done();
        assert_eq!(hints.command(), DONE);
    }
}
