// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host requests and their state (docs/protocol.md, section 5).

use std::collections::BTreeMap;
use std::time::SystemTime;

use balloon_control::{Progress, Ranges, RequestStatus};
use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::page_set::PageSet;
use balloon_wire::request::{Command, Status};

use crate::counters::{Counters, Refusal};
use crate::memory::page_map::PageMap;

/// The number of stored requests: open ones, and those whose answers can be read. Cancels do not count;
/// there can be as many of them.
pub(crate) const MAX_REQUESTS: usize = 4;

/// The maximum number of ranges in a response: far fewer than a client accepts.
pub(crate) const MAX_RANGES: usize = 8192;

/// The memory in the list with this id, from an address on.
pub(crate) fn ranges(id: u64, pages: &PageMap, from: u64) -> Ranges {
    let bytes = |pages: u64| pages.saturating_mul(BALLOON_PAGE_SIZE);
    let mut rest = pages.ranges(from.div_ceil(BALLOON_PAGE_SIZE));
    let ranges = rest.by_ref().take(MAX_RANGES);
    Ranges {
        id,
        end: bytes(pages.end()),
        ranges: ranges
            .map(|range| (bytes(range.start), bytes(range.end - range.start)))
            .collect(),
        next: rest.next().map(|range| bytes(range.start)),
    }
}

/// A request, with its state.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) command: Command,
    pub(crate) status: RequestStatus,
    /// The memory in the answer, in bytes.
    pub(crate) named: u64,
    /// The part of it that was returned to the host, in bytes.
    pub(crate) discarded: u64,
    /// The listed pages, if clients can read them.
    pub(crate) pages: PageMap,
}

impl Kept {
    fn is_cancel(&self) -> bool {
        matches!(self.command, Command::Cancel { .. })
    }
}

/// The maximum number of requests is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The requests of a device.
#[derive(Debug)]
pub struct Requests {
    /// By their ids.
    kept: BTreeMap<u64, Kept>,
    /// The last assigned id.
    pub(crate) last: u64,
    /// The next position in the queue's available ring.
    pub(crate) position: Option<u16>,
    /// Whether the queue was served since it was started.
    at_work: bool,
}

impl Default for Requests {
    /// The guest may still answer requests of an earlier worker. Ids start from the clock's microseconds,
    /// so that this worker does not repeat them. Hints have the ids of 32 bits.
    fn default() -> Self {
        let clock = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let clock = u64::try_from(clock.as_micros()).unwrap_or_default();
        Self::after(clock.max(u32::MAX.into()))
    }
}

impl Requests {
    /// No requests yet. The first assigned id is the one after `last`.
    pub fn after(last: u64) -> Self {
        Self {
            kept: BTreeMap::new(),
            last,
            position: None,
            at_work: false,
        }
    }

    /// Makes a request, which is sent as soon as there is a buffer for it. `pages` stores the pages of the
    /// answer. Returns the id of the request.
    ///
    /// # Errors
    ///
    /// The maximum number of requests is open.
    pub fn begin(&mut self, command: Command, pages: PageMap) -> Result<u64, TooMany> {
        let kept = Kept {
            command,
            status: RequestStatus::Waiting,
            named: 0,
            discarded: 0,
            pages,
        };
        let alike = |other: &&Kept| other.is_cancel() == kept.is_cancel();
        if self.kept.values().filter(alike).count() >= MAX_REQUESTS {
            let ended = self.kept.iter().find(|(_, kept)| kept.status.is_end());
            let (&oldest, _) = ended.filter(|_| !kept.is_cancel()).ok_or(TooMany)?;
            self.kept.remove(&oldest);
        }
        loop {
            self.last = self.last.wrapping_add(1);
            // HR-V1
            if self.last != 0 && !self.kept.contains_key(&self.last) {
                break;
            }
        }
        self.kept.insert(self.last, kept);
        Ok(self.last)
    }

    /// Cancels a request, if it has not ended.
    ///
    /// # Errors
    ///
    /// The maximum number of requests is open.
    pub fn cancel(&mut self, id: u64) -> Result<(), TooMany> {
        let command = Command::Cancel { id };
        match self.kept.get_mut(&id) {
            Some(kept) if kept.status == RequestStatus::Waiting => {
                kept.status = RequestStatus::Cancelled;
            }
            Some(kept) if kept.status == RequestStatus::Open => {
                if !self.kept.values().any(|kept| kept.command == command) {
                    self.begin(command, PageMap::default())?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The request with this id, if it is not a cancel.
    fn find(&self, id: u64) -> Option<&Kept> {
        self.kept.get(&id).filter(|kept| !kept.is_cancel())
    }

    /// The progress of a request.
    pub fn progress(&self, id: u64) -> Option<Progress> {
        self.find(id).map(|kept| Progress {
            id,
            status: kept.status,
            named: kept.named,
            discarded: kept.discarded,
        })
    }

    /// The unused memory that the guest has listed, from an address on.
    pub fn ranges(&self, id: u64, from: u64) -> Option<Ranges> {
        self.find(id).map(|kept| ranges(id, &kept.pages, from))
    }

    /// The number of open requests.
    pub fn open(&self) -> u64 {
        self.kept
            .values()
            .filter(|kept| !kept.status.is_end())
            .fold(0, |open, _| open + 1)
    }

    /// The next request to send.
    pub(crate) fn waiting(&mut self) -> Option<(u64, &mut Kept)> {
        self.kept
            .iter_mut()
            .find(|(_, kept)| kept.status == RequestStatus::Waiting)
            .map(|(&id, kept)| (id, kept))
    }

    /// The request that a message belongs to (HR-V6).
    pub(crate) fn of(&mut self, set: &PageSet<'_>) -> Result<&mut Kept, Refusal> {
        self.kept
            .get_mut(&set.request_id)
            .filter(|kept| kept.status == RequestStatus::Open)
            .filter(|kept| kept.command.names() == Some(set.command))
            .ok_or(Refusal::Malformed)
    }

    /// Records the end of an answer.
    pub(crate) fn end(
        &mut self,
        id: u64,
        status: Status,
        counters: &Counters,
    ) -> Result<(), Refusal> {
        let kept = self.kept.get_mut(&id);
        let kept = kept.filter(|kept| kept.status == RequestStatus::Open);
        let kept = kept.ok_or(Refusal::Malformed)?;
        kept.status = match status {
            Status::Complete => RequestStatus::Complete,
            Status::Aborted => RequestStatus::Aborted,
            Status::Cancelled => RequestStatus::Cancelled,
            Status::Unsupported => RequestStatus::Unsupported,
            Status::Malformed => RequestStatus::Malformed,
            Status::UnknownId => RequestStatus::UnknownId,
        };
        counters.answered(kept.status);
        if kept.is_cancel() {
            self.kept.remove(&id);
        }
        Ok(())
    }

    /// Ends the requests that the guest will not answer after a reset (HR-V8).
    fn reset(&mut self, counters: &Counters) {
        for kept in self.kept.values_mut() {
            if kept.status == RequestStatus::Open {
                kept.status = RequestStatus::Reset;
                counters.answered(kept.status);
            }
        }
        self.kept.retain(|_, kept| !kept.is_cancel());
    }

    /// Records that the queue has been started again, at another index if the driver is a new one.
    pub fn restart(&mut self) {
        self.at_work = false;
    }

    /// Ends all requests, since the guest is gone.
    pub fn disconnect(&mut self, counters: &Counters) {
        self.restart();
        self.reset(counters);
        let rest = self.kept.values_mut();
        for kept in rest.filter(|kept| !kept.status.is_end()) {
            kept.status = RequestStatus::Reset;
        }
    }

    /// The queue continues at `next`. A driver that has seen a request is past index 0, and a driver after a
    /// reset starts there.
    pub(crate) fn start(&mut self, next: u16, counters: &Counters) {
        if !self.at_work && (next == 0 || self.position != Some(next)) {
            self.reset(counters);
        }
        self.at_work = true;
    }
}
