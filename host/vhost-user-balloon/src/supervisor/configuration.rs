// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration space as workers have described it, for times without a worker: QEMU's main loop, and with it the
//! VM, waits for each read.

use balloon_wire::{BALLOON_PAGE_SIZE, config};
use serde::{Deserialize, Serialize};

use crate::vhost_user::message::Message;

/// The length of a field in bytes.
const FIELD: usize = 4;

/// The fields that the driver writes.
const OF_DRIVER: [usize; 3] = [config::ACTUAL, config::POISON_VAL, config::STOP_REASON];

/// The fields of the device. Those of the driver are 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration(Vec<u8>);

impl Default for Configuration {
    /// The device requests nothing, and its granule is at least a balloon page (PS-V3).
    fn default() -> Self {
        let mut fields = vec![0; config::SIZE];
        let granule = BALLOON_PAGE_SIZE.to_le_bytes();
        let bytes = fields.iter_mut().skip(config::DISCARD_GRANULE);
        bytes
            .zip(granule)
            .take(FIELD)
            .for_each(|(byte, new)| *byte = new);
        Self(fields)
    }
}

impl Configuration {
    /// Records a worker's answer to a read. Returns whether that changes a field of the device.
    pub(super) fn record(&mut self, answer: &Message) -> bool {
        let before = self.0.clone();
        let (start, read) = access(answer.body());
        let bytes = self.0.iter_mut().skip(start);
        bytes.zip(read).for_each(|(byte, read)| *byte = *read);
        for field in OF_DRIVER {
            let bytes = self.0.iter_mut().skip(field).take(FIELD);
            bytes.for_each(|byte| *byte = 0);
        }
        self.0 != before
    }

    /// The answer to a read, whatever part it reads. A driver that `is_new` must not read the target of the driver before
    /// it: a worker that starts it notifies it of its own.
    pub(super) fn answer(&self, read: &Message, is_new: bool) -> Message {
        let (start, bytes) = access(read.body());
        let target = config::NUM_PAGES..config::NUM_PAGES + FIELD;
        let known = |place: usize| match self.0.get(place) {
            Some(&byte) if !is_new || !target.contains(&place) => byte,
            _ => 0,
        };
        let header = read.body().len() - bytes.len();
        let header = read.body().get(..header).unwrap_or_default();
        let fields = (start..).take(bytes.len()).map(known);
        let body: Vec<u8> = header.iter().copied().chain(fields).collect();
        read.answer(&body)
    }
}

/// The offset of an access to the configuration space, and its bytes.
pub(super) fn access(body: &[u8]) -> (usize, &[u8]) {
    /// The offset, the size and the flags, of 32 bits each.
    const HEADER: usize = 12;
    let offset = body.first_chunk().copied().map_or(0, u32::from_ne_bytes);
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    (offset, body.get(HEADER..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::message::request;
    use crate::vhost_user::message::tests::message;

    /// An access to these bytes from an offset on.
    fn at(offset: u32, bytes: &[u8]) -> Message {
        let size = u32::try_from(bytes.len()).unwrap();
        let header = [offset, size, 0].map(u32::to_ne_bytes);
        let body = [header.as_flattened(), bytes].concat();
        message(request::GET_CONFIG, &body, vec![])
    }

    fn read(configuration: &Configuration, offset: usize, is_new: bool) -> [u8; FIELD] {
        let question = at(offset.try_into().unwrap(), &[0xff; FIELD]);
        let answer = configuration.answer(&question, is_new);
        assert_eq!(answer.body().len(), question.body().len());
        access(answer.body()).1.try_into().unwrap()
    }

    #[test]
    fn any_field_can_be_read_after_all_were() {
        let mut configuration = Configuration::default();
        assert_eq!(read(&configuration, config::NUM_PAGES, false), [0; 4]);
        assert_eq!(
            read(&configuration, config::DISCARD_GRANULE, false),
            4096_u32.to_le_bytes()
        );
        assert!(configuration.record(&at(0, &[7; config::SIZE])));
        assert_eq!(read(&configuration, config::NUM_PAGES, false), [7; 4]);
        assert_eq!(read(&configuration, config::SIZE, false), [0; 4]);
        assert_eq!(
            read(&configuration, usize::try_from(u32::MAX).unwrap(), false),
            [0; 4]
        );
    }

    #[test]
    fn what_the_driver_writes_is_not_the_devices() {
        let mut configuration = Configuration::default();
        let mut fields = [0; config::SIZE];
        fields[config::DISCARD_GRANULE + 1] = 16;
        fields[config::ACTUAL] = 1;
        assert!(!configuration.record(&at(0, &fields)));
        assert_eq!(read(&configuration, config::ACTUAL, false), [0; 4]);
    }

    #[test]
    fn a_new_driver_does_not_read_the_target_of_the_one_before() {
        let mut configuration = Configuration::default();
        configuration.record(&at(0, &[7; config::SIZE]));
        assert_eq!(read(&configuration, config::NUM_PAGES, true), [0; 4]);
        let hint = config::FREE_PAGE_HINT_CMD_ID;
        assert_eq!(read(&configuration, hint, true), [7; 4]);
    }
}
