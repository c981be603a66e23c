// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Timers that the worker waits for together with the queues.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use log::error;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A timer that is readable after it has expired.
#[derive(Debug)]
pub(crate) struct Timer(TimerFd);

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    ///
    /// The system has no file descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        // The timer may be stopped between the event and the read, which must not block then.
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Sets it to expire once, and returns whether that succeeded.
    pub(crate) fn once(&self, after: Duration) -> bool {
        let after = Expiration::OneShot(TimeSpec::from_duration(after));
        let set = self.0.set(after, TimerSetTimeFlags::empty());
        set.inspect_err(|error| error!("cannot set a timer: {error}"))
            .is_ok()
    }

    /// Sets it to expire periodically.
    ///
    /// # Errors
    ///
    /// The system has no such timer.
    pub(crate) fn every(&self, first: Duration, interval: Duration) -> io::Result<()> {
        let [first, interval] = [first, interval].map(TimeSpec::from_duration);
        let after = Expiration::IntervalDelayed(first, interval);
        Ok(self.0.set(after, TimerSetTimeFlags::empty())?)
    }

    /// Stops it.
    ///
    /// # Errors
    ///
    /// The system has no such timer.
    pub(crate) fn stop(&self) -> io::Result<()> {
        Ok(self.0.unset()?)
    }

    /// Whether it will expire.
    #[cfg(test)]
    pub(crate) fn is_set(&self) -> bool {
        self.0.get().unwrap().is_some()
    }

    /// Makes it unreadable until it expires again.
    pub(crate) fn acknowledge(&self) {
        // A stopped timer has nothing to read.
        let _ = self.0.wait();
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
