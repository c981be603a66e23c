// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the control socket is answered.

use std::time::Duration;

use balloon_control::{
    ControlError, ErrorKind, Guest, Handler, HintAction, Info, Metrics, Request, Response,
};
use balloon_wire::BALLOON_PAGE_SIZE;

use crate::config::bytes;
use crate::device::Device;
use crate::features::{Feature, names};
use crate::hinting::Hints;
use crate::metrics;

/// How long a guest may take to send statistics. They come at once from a guest that is at work, and a
/// client waits longer than this.
const STATS_TIMEOUT: Duration = Duration::from_secs(5);

impl Handler for Device {
    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        match request {
            Request::Info {} => Ok(Response::Info(self.info())),
            Request::Set { bytes } => self.set(bytes),
            Request::Stats { fresh } => self.tell_stats(fresh),
            Request::SetStatsInterval { seconds } => match self.set_stats_interval(seconds) {
                Ok(()) => Ok(Response::Done {}),
                Err(error) => Err(ControlError::new(
                    ErrorKind::Failed,
                    format!("the interval cannot be set and kept: {error}"),
                    "see that the daemon can write its state file",
                )),
            },
            Request::Hints { action } => {
                self.need(Feature::FreePageHinting)?;
                self.command(match action {
                    HintAction::Start => Hints::start,
                    HintAction::Stop => Hints::stop,
                    HintAction::Done => Hints::done,
                });
                Ok(Response::Done {})
            }
            Request::Metrics {} => Ok(Response::Metrics(Metrics {
                text: metrics::text(&self.info()),
            })),
        }
    }
}

impl Device {
    fn info(&self) -> Info {
        let state = self.state();
        let features = self.features_at_work();
        let (memory, granule) = self.sizes();
        let shortfall = state.config.shortfall();
        Info {
            target: bytes(state.config.target),
            size: bytes(state.config.actual),
            memory: self
                .connected()
                .then_some(memory)
                .filter(|&bytes| bytes > 0),
            granule: granule.unwrap_or(BALLOON_PAGE_SIZE),
            stats_interval: state.stats_interval,
            uptime: self.counters.uptime().as_secs(),
            guest: Guest {
                connected: self.connected(),
                driver: self.running(),
                features: names(features),
                answered: self.answered().map(|at| at.elapsed().as_secs()),
                short_of_target: shortfall.filter(|_| features & Feature::StopReason.mask() != 0),
            },
            counters: self.counters.snapshot(),
        }
    }

    /// A target may be set before there is a guest. What is more than its memory would leave it nothing.
    fn set(&self, bytes: u64) -> Result<Response, ControlError> {
        let (memory, _) = self.sizes();
        if memory > 0 && bytes > memory {
            return Err(ControlError::new(
                ErrorKind::OutOfRange,
                format!("the guest has only {memory} bytes of memory"),
                "ask for less than that",
            ));
        }
        let pages = u32::try_from(bytes / BALLOON_PAGE_SIZE).map_err(|_| {
            ControlError::new(
                ErrorKind::OutOfRange,
                format!("{bytes} bytes are more than a balloon can have"),
                "ask for less than 16 TiB",
            )
        })?;
        self.set_target(pages).map_err(|error| {
            ControlError::new(
                ErrorKind::Failed,
                format!("the target is set, but cannot be kept: {error}"),
                "see that the daemon can write its state file",
            )
        })?;
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
                "see that the guest is not paused, and try again",
            )
        })
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
                "start the daemon with this feature, and use a driver that has it",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::device;

    fn kind(result: Result<Response, ControlError>) -> ErrorKind {
        result.unwrap_err().kind
    }

    #[test]
    fn a_target_waits_for_its_guest() {
        let device = device(&[Feature::Stats], false);
        device.handle(Request::Set { bytes: 5 << 20 }).unwrap();
        let Ok(Response::Info(info)) = device.handle(Request::Info {}) else {
            panic!("no info");
        };
        assert_eq!((info.target, info.size, info.memory), (5 << 20, 0, None));
        assert!(!info.guest.connected && !info.guest.driver);
        assert_eq!(
            kind(device.handle(Request::Set { bytes: 1 << 60 })),
            ErrorKind::OutOfRange
        );
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
