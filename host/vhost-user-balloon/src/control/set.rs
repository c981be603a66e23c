// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command that sets the target.

use balloon_control::{ControlError, ErrorKind, Response};
use balloon_wire::BALLOON_PAGE_SIZE;

use crate::device::Device;

impl Device {
    /// A target may be set before there is a guest. A target above the guest's memory would leave nothing to it.
    /// Recently plugged memory counts: the device raises the requested size when the guest uses that memory.
    pub(super) fn set(&self, bytes: u64) -> Result<Response, ControlError> {
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
        device.handle(Request::Set { bytes: 5 << 20 }).unwrap();
        let Ok(Response::Info(info)) = device.handle(Request::Info {}) else {
            panic!("no info");
        };
        assert_eq!((info.target, info.size, info.memory), (5 << 20, 0, None));
        assert!(!info.guest.connected && !info.guest.driver);
        let error = device.handle(Request::Set { bytes: 1 << 60 }).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfRange);
    }
}
