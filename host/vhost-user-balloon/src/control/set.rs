// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command that sets the target.

use std::time::Duration;

use balloon_control::{ControlError, ErrorKind, Response};
use balloon_wire::BALLOON_PAGE_SIZE;

use super::check_owner;
use crate::device::Device;
use crate::device::lease::NewTarget;
use crate::device::target::SetError;
use crate::virtio::config;

/// The shortest lease: a client has to renew it before it ends.
const LEAST_LEASE: Duration = Duration::from_millis(100);

/// The longest lease.
const MOST_LEASE: Duration = Duration::from_secs(24 * 60 * 60);

impl Device {
    /// Sets the target, unless another one than `expected` is in force. With a lease, in milliseconds, it is in force for
    /// that long, and then the target is `fallback`. The lease has the `owner`'s name. Meanwhile the device may lower the
    /// target by `release`.
    pub(super) fn set(
        &self,
        bytes: u64,
        expected: Option<u64>,
        lease: Option<u64>,
        fallback: Option<u64>,
        owner: Option<String>,
        release: Option<u64>,
    ) -> Result<Response, ControlError> {
        if lease.is_none() && (fallback.is_some() || owner.is_some() || release.is_some()) {
            return Err(ControlError::new(
                ErrorKind::BadRequest,
                "a fallback, an owner and a release go with a lease, and there is no lease",
                "add the lease, or leave out the fallback, the owner and the release",
            ));
        }
        check_owner(owner.as_deref())?;
        let new = NewTarget {
            pages: self.permitted(bytes)?,
            expected: expected.map(|bytes| bytes / BALLOON_PAGE_SIZE),
            lease: lease.map(time).transpose()?,
            fallback: fallback.map(pages).transpose()?,
            owner,
            release: release.map(pages).transpose()?,
        };
        match self.set_target(new) {
            Ok(()) => Ok(Response::Done {}),
            Err(SetError::Conflict(target)) => Err(conflict(config::bytes(target))),
            Err(SetError::Unsaved(error)) => Err(ControlError::new(
                ErrorKind::Failed,
                format!("the target is set, but cannot be kept: {error}"),
                "make sure that the daemon can write its state file",
            )),
        }
    }

    /// A target in balloon pages, if the guest can have it. A target may be set before there is a guest. A target above
    /// the guest's memory would leave nothing to it. Recently plugged memory counts: the device raises the requested size
    /// when the guest uses that memory. A lease can always be renewed: the guest may have become smaller.
    fn permitted(&self, bytes: u64) -> Result<u32, ControlError> {
        let pages = pages(bytes)?;
        let state = self.state();
        if state.lease.is_some() && state.config.target == pages {
            return Ok(pages);
        }
        let (memory, limit) = match self.is_outdated() {
            true => (Some(self.sizes().memory), None),
            false => (self.guest_memory(), self.limit()),
        };
        if let Some(memory) = memory.filter(|&memory| bytes > memory) {
            return Err(ControlError::new(
                ErrorKind::OutOfRange,
                format!("the guest has only {memory} bytes of memory"),
                "ask for less than that",
            ));
        }
        if let Some(limit) = limit.filter(|&limit| bytes > limit) {
            return Err(ControlError::new(
                ErrorKind::OutOfRange,
                format!("more than {limit} bytes would leave the guest too little"),
                "ask for less than that, or start the daemon with a smaller --floor",
            ));
        }
        Ok(pages)
    }
}

/// A target in balloon pages.
fn pages(bytes: u64) -> Result<u32, ControlError> {
    u32::try_from(bytes / BALLOON_PAGE_SIZE).map_err(|_| {
        ControlError::new(
            ErrorKind::OutOfRange,
            format!("{bytes} bytes are more than a balloon can have"),
            "ask for less than 16 TiB",
        )
    })
}

/// The time of a lease in milliseconds.
fn time(lease: u64) -> Result<Duration, ControlError> {
    let time = Duration::from_millis(lease);
    if !(LEAST_LEASE..=MOST_LEASE).contains(&time) {
        return Err(ControlError::new(
            ErrorKind::OutOfRange,
            "a lease has to be from 100 milliseconds to one day",
            "name 100 to 86400000 milliseconds, and renew it before they are over",
        ));
    }
    Ok(time)
}

/// Another target than the expected one is in force.
fn conflict(target: u64) -> ControlError {
    ControlError {
        target: Some(target),
        ..ControlError::new(
            ErrorKind::Conflict,
            format!("another target is in force: {target} bytes"),
            "find the other client, and repeat the command with this target if you want to replace it",
        )
    }
}

#[cfg(test)]
mod tests {
    use balloon_control::{Handler, Request};

    use super::*;
    use crate::testing::device;
    use crate::virtio::features::Feature;

    #[test]
    fn a_target_waits_for_its_guest() {
        let device = device(&[Feature::Stats], false);
        device.handle(Request::set(5 << 20)).unwrap();
        let Ok(Response::Info(info)) = device.handle(Request::Info {}) else {
            panic!("no info");
        };
        assert_eq!((info.target, info.size, info.memory), (5 << 20, 0, None));
        assert!(!info.guest.connected && !info.guest.driver);
        let error = device.handle(Request::set(1 << 60)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfRange);
    }
    #[test]
    fn a_target_replaces_only_the_expected_one() {
        let device = device(&[Feature::Stats], false);
        let set = |bytes, expected| {
            device.handle(Request::Set {
                bytes,
                expected: Some(expected),
                lease: None,
                fallback: None,
                owner: None,
                release: None,
            })
        };
        set(5 << 20, 0).unwrap();
        let error = set(6 << 20, 0).unwrap_err();
        assert_eq!(
            (error.kind, error.target),
            (ErrorKind::Conflict, Some(5 << 20))
        );
        assert_eq!(set(6 << 20, u64::MAX).unwrap_err().target, Some(5 << 20));
        // Both are rounded down to pages.
        set((6 << 20) + 1, (5 << 20) + 1).unwrap();
        set(0, 6 << 20).unwrap();
    }
    #[test]
    fn a_lease_has_limits() {
        let device = device(&[Feature::Stats], false);
        let set = |lease, fallback| {
            device.handle(Request::Set {
                bytes: 5 << 20,
                expected: None,
                lease,
                fallback,
                owner: None,
                release: None,
            })
        };
        for lease in [0, 99, 86_400_001, u64::MAX] {
            let error = set(Some(lease), None).unwrap_err();
            assert_eq!(error.kind, ErrorKind::OutOfRange, "{lease}");
        }
        let error = set(Some(100), Some(u64::MAX)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfRange);
        assert_eq!(set(None, Some(0)).unwrap_err().kind, ErrorKind::BadRequest);
        assert_eq!(device.state().config.target, 0);
        set(Some(86_400_000), None).unwrap();
        set(Some(100), Some(4096)).unwrap();
        let Ok(Response::Info(info)) = device.handle(Request::Info {}) else {
            panic!("no info");
        };
        let lease = info.lease.unwrap();
        assert!(lease.remaining <= 100 && lease.fallback == 4096);
        set(None, None).unwrap();
        assert_eq!(device.state().lease, None);
    }

    #[test]
    fn a_lease_has_an_owner() {
        let device = device(&[Feature::Stats], false);
        let set = |lease, owner: &str| {
            device.handle(Request::Set {
                bytes: 5 << 20,
                expected: None,
                lease,
                fallback: None,
                owner: Some(owner.to_owned()),
                release: None,
            })
        };
        assert_eq!(
            set(None, "manager").unwrap_err().kind,
            ErrorKind::BadRequest
        );
        for owner in ["", "a\nb", &"a".repeat(65)] {
            assert_eq!(
                set(Some(100), owner).unwrap_err().kind,
                ErrorKind::OutOfRange
            );
        }
        for owner in ["manager", "another"] {
            set(Some(60_000), owner).unwrap();
            let Ok(Response::Info(info)) = device.handle(Request::Info {}) else {
                panic!("no info");
            };
            assert_eq!(info.lease.unwrap().owner.as_deref(), Some(owner));
        }
    }

    #[test]
    fn a_release_goes_with_a_lease() {
        let device = device(&[Feature::Stats], false);
        let set = |lease, release| {
            device.handle(Request::Set {
                bytes: 5 << 20,
                expected: None,
                lease,
                fallback: None,
                owner: None,
                release: Some(release),
            })
        };
        assert_eq!(set(None, 0).unwrap_err().kind, ErrorKind::BadRequest);
        let error = set(Some(100), u64::MAX).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfRange);
        let released = || match device.handle(Request::Info {}) {
            Ok(Response::Info(info)) => (info.target, info.release, info.released),
            other => panic!("{other:?}"),
        };
        assert_eq!(released(), (0, Some(0), 0));
        set(Some(60_000), 1 << 20).unwrap();
        assert_eq!(released(), (5 << 20, Some(1 << 20), 0));
        device.release();
        assert_eq!(released(), (4 << 20, Some(0), 1 << 20));
        device.release();
        assert_eq!(released(), (4 << 20, Some(0), 1 << 20));
        // No more than there is.
        set(Some(60_000), 6 << 20).unwrap();
        assert_eq!(released(), (5 << 20, Some(5 << 20), 0));
    }
}
