// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of the guest's memory: answers to host requests, and free page hints.

use balloon_control::{Begun, ControlError, HintAction, Response};

use super::no_request;
use crate::device::Device;
use crate::queues::hinting::Hints;
use crate::virtio::features::Feature;

impl Device {
    pub(super) fn hint(&self, action: HintAction) -> Result<Response, ControlError> {
        self.need(Feature::FreePageHinting)?;
        match action {
            HintAction::Start => {
                let id = self.request_hints();
                return Ok(Response::Begun(Begun { id }));
            }
            HintAction::Stop => self.command(Hints::stop),
            HintAction::Done => self.command(Hints::done),
        }
        Ok(Response::Done {})
    }

    /// Without a driver no client must wait for an answer of the guest.
    pub(super) fn progress(&self, id: u64) -> Result<Response, ControlError> {
        let request = self.requests().progress(id);
        let (progress, feature) = match request {
            Some(request) => (request, Feature::HostRequests),
            None => {
                let list = self.hints().progress(id);
                let list = list.ok_or_else(|| no_request(id))?;
                (list, Feature::FreePageHinting)
            }
        };
        if !progress.status.is_end() {
            self.need(feature)?;
        }
        Ok(Response::Progress(progress))
    }

    pub(super) fn ranges(&self, id: u64, from: u64) -> Result<Response, ControlError> {
        let unused = self.requests().ranges(id, from);
        let ranges = unused.or_else(|| self.hints().ranges(id, from));
        ranges.map(Response::Ranges).ok_or_else(|| no_request(id))
    }
}
