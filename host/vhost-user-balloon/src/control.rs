// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands of the control socket.

use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

use balloon_control::{
    Begun, Changes, ControlError, ErrorKind, Guest, Handler, Info, Lease, Metrics, Request,
    Response,
};
use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::request::{Command, Wanted};

use crate::device::{Device, Sizes};
use crate::virtio::config::bytes;
use crate::virtio::features::{Feature, names};

use crate::device::lease::clock;
use crate::device::state::{MAX_INHIBIT, MAX_INHIBITORS};
use crate::queues::requests::{MAX_REQUESTS, TooMany};

mod lists;
mod metrics;
mod set;

/// How long a guest may take to send statistics. A running guest sends them at once, and a client
/// waits longer than this.
const STATS_TIMEOUT: Duration = Duration::from_secs(5);

/// The intervals of statistics that a subscriber may want, in milliseconds. A guest needs some time for each sample.
const INTERVALS: RangeInclusive<u64> = 50..=3_600_000;

impl Handler for Device {
    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn sample_every(&self, interval: Option<Duration>) {
        self.set_wished_interval(interval);
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        match request {
            Request::Info {} => Ok(Response::Info(self.info())),
            Request::Subscribe { stats_milliseconds } => subscribe(stats_milliseconds),
            Request::Set {
                bytes,
                expected,
                lease,
                fallback,
                owner,
                release,
            } => self.set(bytes, expected, lease, fallback, owner, release),
            Request::Stats { fresh } => self.tell_stats(fresh),
            Request::SetStatsInterval { seconds } => self.set_interval(seconds),
            Request::Inhibit { seconds, owner } => self.inhibit_for(seconds, owner.as_deref()),
            Request::Resume { owner } => {
                self.resume(owner.as_deref())
                    .map_err(|error| cannot_keep(&error))?;
                Ok(Response::Done {})
            }
            Request::Hints { action } => self.hint(action),
            Request::Unused { block, start, end } => {
                self.ask_guest(Command::UnusedSkip(wanted(block, start, end)?))
            }
            Request::Reclaim { block, start, end } => self.reclaim(wanted(block, start, end)?),
            Request::DropCaches { pages, slab } if pages || slab => {
                self.ask_guest(Command::DropCaches { pages, slab })
            }
            Request::DropCaches { .. } => Err(ControlError::new(
                ErrorKind::OutOfRange,
                "there are no caches but these two",
                "name pages, slab or both",
            )),
            Request::Progress { id } => self.progress(id),
            Request::Ranges { id, from } => self.ranges(id, from),
            Request::Cancel { id } => {
                self.cancel(id).map_err(too_many)?;
                let progress = self.requests().progress(id);
                progress
                    .map(Response::Progress)
                    .ok_or_else(|| no_request(id))
            }
            Request::Metrics {} => Ok(Response::Metrics(Metrics {
                text: metrics::text(&self.info(), self.stats().as_ref(), self.name()),
            })),
        }
    }
}

impl Device {
    fn info(&self) -> Info {
        let state = self.state();
        let features = self.features_at_work();
        let Sizes {
            memory, granule, ..
        } = self.sizes();
        let shared = Some(memory).filter(|&bytes| bytes > 0 && self.connected());
        let seconds = |rest: Duration| rest.as_secs().saturating_add(1);
        let inhibitors = self.inhibitors();
        let inhibited = inhibitors.values().max().copied();
        let hazards = self.hazards();
        let mut withheld: Vec<_> = hazards.iter().map(ToString::to_string).collect();
        withheld.extend(inhibited.map(|_| "inhibited".to_owned()));
        let shortfall = state.config.shortfall();
        Info {
            name: self.name().map(str::to_owned),
            vmm: self.vmm(),
            target: bytes(state.config.target),
            size: bytes(state.config.actual),
            held: self.held(),
            resident: self.resident(),
            memory: shared.and_then(|_| self.guest_memory()),
            shared,
            limit: shared.and_then(|_| self.limit()),
            lease: state.lease.map(|lease| Lease {
                remaining: milliseconds(lease.term.until.saturating_sub(clock())),
                fallback: bytes(lease.fallback),
                owner: lease.owner,
            }),
            lapsed: state.lapsed,
            release: Some(bytes(state.release.left)),
            released: bytes(state.release.used),
            grace: self.grace().map(seconds),
            granule: granule.unwrap_or(BALLOON_PAGE_SIZE),
            withheld,
            inhibited: inhibited.map(seconds),
            inhibitors: inhibitors
                .into_iter()
                .map(|(owner, rest)| (owner, seconds(rest)))
                .collect(),
            stats_interval: state.stats_interval,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: self.counters.uptime().as_secs(),
            guest: Guest {
                connected: self.connected(),
                driver: self.running(),
                features: names(features),
                answered: self.answered().map(|at| at.elapsed().as_secs()),
                short_of_target: shortfall.filter(|_| features & Feature::StopReason.mask() != 0),
                open_requests: self.requests().open(),
            },
            counters: self.counters.snapshot(),
        }
    }

    fn set_interval(&self, seconds: u32) -> Result<Response, ControlError> {
        self.set_stats_interval(seconds).map_err(|error| {
            ControlError::new(
                ErrorKind::Failed,
                format!("the interval cannot be set and kept: {error}"),
                "make sure that the daemon can write its state file",
            )
        })?;
        Ok(Response::Done {})
    }

    fn reclaim(&self, wanted: Wanted) -> Result<Response, ControlError> {
        if self.keeps_free_pages() {
            return Err(ControlError::new(
                ErrorKind::Unsupported,
                "the guest relies on the content of its free pages, and none can be returned to the host",
                "start the guest's kernel without init_on_free and page_poison",
            ));
        }
        if let Some(reason) = self.info().withheld.first() {
            return Err(ControlError::new(
                ErrorKind::Failed,
                format!("no memory is returned to the host: {reason}"),
                "see --allow in vhost-user-balloon(8)",
            ));
        }
        self.ask_guest(Command::UnusedDiscard(wanted))
    }

    /// Stops returning memory to the host for a time.
    fn inhibit_for(&self, seconds: u64, owner: Option<&str>) -> Result<Response, ControlError> {
        let limit = MAX_INHIBIT.as_secs();
        if !(1..=limit).contains(&seconds) {
            return Err(ControlError::new(
                ErrorKind::OutOfRange,
                "the time limit has to be from 1 second to one day",
                format!(
                    "name 1 to {limit} seconds, and send the request again before that time ends"
                ),
            ));
        }
        check_owner(owner)?;
        let time = Duration::from_secs(seconds);
        let owner = owner.unwrap_or_default();
        if !self
            .inhibit(owner, time)
            .map_err(|error| cannot_keep(&error))?
        {
            return Err(ControlError::new(
                ErrorKind::Failed,
                format!("{MAX_INHIBITORS} owners have an inhibit already"),
                "end one of those that `balloonctl info` shows: balloonctl resume --owner NAME",
            ));
        }
        Ok(Response::Done {})
    }

    fn tell_stats(&self, fresh: bool) -> Result<Response, ControlError> {
        let stats = if fresh {
            self.need(Feature::Stats)?;
            self.fresh_stats(STATS_TIMEOUT)
        } else {
            let last = self.stats();
            if last.is_none() {
                self.need(Feature::Stats)?;
            }
            last
        };
        stats.map(Response::Stats).ok_or_else(|| {
            ControlError::new(
                ErrorKind::Timeout,
                "the guest has sent no statistics",
                "check that the guest is not paused, and try again",
            )
        })
    }

    fn ask_guest(&self, command: Command) -> Result<Response, ControlError> {
        self.need(Feature::HostRequests)?;
        let id = self.request(command).map_err(too_many)?;
        Ok(Response::Begun(Begun { id }))
    }

    /// Makes sure that there is a driver with a feature.
    fn need(&self, feature: Feature) -> Result<(), ControlError> {
        if !self.connected() {
            return Err(ControlError::new(
                ErrorKind::NoGuest,
                "no VMM is connected",
                "start the VM, with its vhost-user device on this daemon's socket",
            ));
        }
        if !self.running() {
            return Err(ControlError::new(
                ErrorKind::NoDriver,
                "no driver in the guest works with the balloon",
                "load virtio_balloon or virtio_balloon_rs in the guest",
            ));
        }
        if self.features_at_work() & feature.mask() == 0 {
            return Err(ControlError::new(
                ErrorKind::Unsupported,
                format!("{feature} was not negotiated with the guest's driver"),
                "start the daemon with this feature (--features, --extensions), and use a driver that has it",
            ));
        }
        Ok(())
    }
}

/// Checks the interval of statistics of a subscriber, in milliseconds.
fn subscribe(interval: Option<u64>) -> Result<Response, ControlError> {
    if interval.is_some_and(|interval| !INTERVALS.contains(&interval)) {
        return Err(ControlError::new(
            ErrorKind::OutOfRange,
            "the interval of statistics has to be from 50 milliseconds to one hour",
            format!(
                "name {} to {} milliseconds",
                INTERVALS.start(),
                INTERVALS.end()
            ),
        ));
    }
    Ok(Response::Subscribed {})
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Checks the name of an owner. Output shows it in lines of text.
fn check_owner(owner: Option<&str>) -> Result<(), ControlError> {
    let is_valid =
        |name: &str| (1..=64).contains(&name.len()) && !name.chars().any(char::is_control);
    match owner.is_none_or(is_valid) {
        true => Ok(()),
        false => Err(ControlError::new(
            ErrorKind::OutOfRange,
            "the name of an owner has 1 to 64 bytes, and no control characters",
            "choose another name",
        )),
    }
}

fn cannot_keep(error: &io::Error) -> ControlError {
    ControlError::new(
        ErrorKind::Failed,
        format!("this is in effect, but cannot be kept over a restart of the daemon: {error}"),
        "make sure that the daemon can write its state file",
    )
}

/// The range and block size of a request, in bytes.
fn wanted(block: u64, start: u64, end: u64) -> Result<Wanted, ControlError> {
    if !block.is_power_of_two() || block < BALLOON_PAGE_SIZE {
        return Err(ControlError::new(
            ErrorKind::OutOfRange,
            format!("there are no blocks of {block} bytes"),
            format!("name a power of two, {BALLOON_PAGE_SIZE} or more"),
        ));
    }
    if end != 0 && end <= start {
        return Err(ControlError::new(
            ErrorKind::OutOfRange,
            format!("there is no memory from {start} to {end}"),
            "name an end above the start, or 0 for the end of memory",
        ));
    }
    // It is 63 at most.
    let block_shift = u8::try_from(block.trailing_zeros()).unwrap_or(u8::MAX);
    Ok(Wanted {
        block_shift,
        start,
        end,
    })
}

fn too_many(_: TooMany) -> ControlError {
    ControlError::new(
        ErrorKind::Failed,
        format!("{MAX_REQUESTS} requests to the guest are open already"),
        "wait until one of these requests has ended, or cancel it",
    )
}

fn no_request(id: u64) -> ControlError {
    ControlError::new(
        ErrorKind::OutOfRange,
        format!("there is no request {id}, or not any more"),
        "read an answer before the next requests are made: few are kept",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::device;
    use balloon_control::{HintAction, RequestStatus};

    fn kind(result: Result<Response, ControlError>) -> ErrorKind {
        result.unwrap_err().kind
    }

    #[test]
    fn an_owner_ends_its_own_inhibit() {
        let device = device(&[Feature::Stats], false);
        let inhibit = |owner: &str| {
            device.handle(Request::Inhibit {
                seconds: 60,
                owner: (!owner.is_empty()).then(|| owner.to_owned()),
            })
        };
        let resume = |owner: Option<&str>| {
            let owner = owner.map(str::to_owned);
            device.handle(Request::Resume { owner }).unwrap();
            let info = device.info();
            assert_eq!(info.withheld.is_empty(), info.inhibitors.is_empty());
            info.inhibitors.into_keys().collect::<Vec<_>>()
        };
        for owner in ["", "backup", "snapshot"] {
            inhibit(owner).unwrap();
        }
        assert_eq!(resume(Some("backup")), ["", "snapshot"]);
        assert_eq!(resume(Some("backup")), ["", "snapshot"]);
        assert_eq!(resume(None), [""; 0]);
        for name in ["\n", &"x".repeat(65)] {
            assert_eq!(kind(inhibit(name)), ErrorKind::OutOfRange);
        }
        for number in 0..MAX_INHIBITORS {
            inhibit(&format!("{number}")).unwrap();
        }
        assert_eq!(kind(inhibit("another")), ErrorKind::Failed);
    }

    #[test]
    fn nobody_answers_without_a_guest() {
        let device = device(&[Feature::Stats], false);
        let hints = Request::Hints {
            action: HintAction::Start,
        };
        assert_eq!(kind(device.handle(hints)), ErrorKind::NoGuest);
        for fresh in [true, false] {
            assert_eq!(
                kind(device.handle(Request::Stats { fresh })),
                ErrorKind::NoGuest
            );
        }
    }

    #[test]
    fn requests_are_checked_before_the_guest_is_asked() {
        let device = device(&[Feature::Stats], true);
        let unused = |block, start, end| device.handle(Request::Unused { block, start, end });
        for (block, start, end) in [(0, 0, 0), (2048, 0, 0), (12288, 0, 0), (4096, 5, 5)] {
            assert_eq!(kind(unused(block, start, end)), ErrorKind::OutOfRange);
        }
        assert_eq!(kind(unused(1 << 63, 5, 6)), ErrorKind::NoGuest);
        let caches = |pages, slab| kind(device.handle(Request::DropCaches { pages, slab }));
        assert_eq!(caches(false, false), ErrorKind::OutOfRange);
        assert_eq!(caches(false, true), ErrorKind::NoGuest);
        let reclaim = Request::Reclaim {
            block: 4096,
            start: 0,
            end: 0,
        };
        assert_eq!(kind(device.handle(reclaim)), ErrorKind::NoGuest);
        for request in [
            Request::Progress { id: 1 },
            Request::Cancel { id: 1 },
            Request::Ranges { id: 1, from: 0 },
        ] {
            assert_eq!(kind(device.handle(request)), ErrorKind::OutOfRange);
        }
    }

    #[test]
    fn a_guest_that_is_not_there_is_not_waited_for() {
        let device = device(&[], true);
        let id = device
            .request(Command::Cancel { id: 1 })
            .and_then(|_| device.request(Command::UnusedSkip(wanted(4096, 0, 0).unwrap())))
            .unwrap();
        let progress = |id| device.handle(Request::Progress { id });
        assert_eq!(kind(progress(id)), ErrorKind::NoGuest);
        // Clients do not query cancels.
        assert_eq!(kind(progress(id - 1)), ErrorKind::OutOfRange);
        let Ok(Response::Progress(cancelled)) = device.handle(Request::Cancel { id }) else {
            panic!("no progress");
        };
        assert_eq!(cancelled.status, RequestStatus::Cancelled);
        assert!(matches!(progress(id), Ok(Response::Progress(same)) if same == cancelled));
        let ranges = device.handle(Request::Ranges { id, from: 0 });
        let Ok(Response::Ranges(ranges)) = ranges else {
            panic!("no ranges");
        };
        assert_eq!((ranges.ranges, ranges.next, ranges.end), (vec![], None, 0));
        let id = device.request_hints();
        assert_eq!(kind(progress(id)), ErrorKind::NoGuest);
        let list = device.handle(Request::Ranges { id, from: 0 });
        assert!(matches!(list, Ok(Response::Ranges(list)) if list.id == id));
    }

    #[test]
    fn the_interval_of_a_subscriber_has_limits() {
        let device = device(&[Feature::Stats], false);
        let subscribe = |milliseconds| {
            let stats_milliseconds = Some(milliseconds);
            device.handle(Request::Subscribe { stats_milliseconds })
        };
        for milliseconds in [0, 49, 3_600_001] {
            assert_eq!(kind(subscribe(milliseconds)), ErrorKind::OutOfRange);
        }
        for milliseconds in [50, 3_600_000] {
            subscribe(milliseconds).unwrap();
        }
    }

    #[test]
    fn the_interval_is_kept() {
        let device = device(&[Feature::Stats], false);
        device
            .handle(Request::SetStatsInterval { seconds: 7 })
            .unwrap();
        assert_eq!(device.state().stats_interval, 7);
        device
            .handle(Request::SetStatsInterval { seconds: 0 })
            .unwrap();
        assert_eq!(device.state().stats_interval, 0);
    }
}
