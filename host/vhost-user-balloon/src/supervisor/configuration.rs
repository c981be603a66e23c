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

/// The fields that are 0 for a new driver. A worker that starts it notifies it of its target.
const OF_THIS_DRIVER: [usize; 4] = [
    config::NUM_PAGES,
    config::ACTUAL,
    config::FREE_PAGE_HINT_CMD_ID,
    config::STOP_REASON,
];

/// All fields, as the device and the driver have last written them.
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
        let mut changed = false;
        self.copy(answer, |place, has_changed| {
            changed |= has_changed && !is_in(&OF_DRIVER, place);
            true
        });
        changed
    }

    /// Records a write of the driver. The front end may write other fields, too, as it has read them.
    pub(super) fn record_written(&mut self, write: &Message) {
        self.copy(write, |place, _| is_in(&OF_DRIVER, place));
    }

    /// Copies the bytes of an access for which `is_copied` holds, given their place and whether they differ.
    fn copy(&mut self, access: &Message, mut is_copied: impl FnMut(usize, bool) -> bool) {
        let (start, bytes) = self::access(access.body());
        let fields = self.0.iter_mut().enumerate().skip(start);
        for ((place, field), byte) in fields.zip(bytes) {
            if is_copied(place, *field != *byte) {
                *field = *byte;
            }
        }
    }

    /// Begins with a new driver, which must not read what the driver before it and the device have agreed on.
    pub(super) fn reset(&mut self) {
        for (place, field) in self.0.iter_mut().enumerate() {
            if is_in(&OF_THIS_DRIVER, place) {
                *field = 0;
            }
        }
    }

    /// The answer to a read, whatever part it reads.
    pub(super) fn answer(&self, read: &Message) -> Message {
        let (start, bytes) = access(read.body());
        let known = |place: usize| self.0.get(place).copied().unwrap_or_default();
        let header = read.body().len() - bytes.len();
        let header = read.body().get(..header).unwrap_or_default();
        let fields = (start..).take(bytes.len()).map(known);
        let body: Vec<u8> = header.iter().copied().chain(fields).collect();
        read.answer(&body)
    }
}

/// Whether a place is in one of these fields.
pub(super) fn is_in(fields: &[usize], place: usize) -> bool {
    fields
        .iter()
        .any(|&field| (field..field + FIELD).contains(&place))
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

    fn read(configuration: &Configuration, offset: usize) -> [u8; FIELD] {
        let question = at(offset.try_into().unwrap(), &[0xff; FIELD]);
        let answer = configuration.answer(&question);
        assert_eq!(answer.body().len(), question.body().len());
        access(answer.body()).1.try_into().unwrap()
    }

    #[test]
    fn any_field_can_be_read_after_all_were() {
        let mut configuration = Configuration::default();
        assert_eq!(read(&configuration, config::NUM_PAGES), [0; 4]);
        assert_eq!(
            read(&configuration, config::DISCARD_GRANULE),
            4096_u32.to_le_bytes()
        );
        assert!(configuration.record(&at(0, &[7; config::SIZE])));
        assert_eq!(read(&configuration, config::NUM_PAGES), [7; 4]);
        assert_eq!(read(&configuration, config::SIZE), [0; 4]);
        assert_eq!(
            read(&configuration, usize::try_from(u32::MAX).unwrap()),
            [0; 4]
        );
    }

    #[test]
    fn what_the_driver_writes_changes_no_field_of_the_device() {
        let mut configuration = Configuration::default();
        let mut fields = [0; config::SIZE];
        fields[config::DISCARD_GRANULE + 1] = 16;
        fields[config::ACTUAL] = 1;
        assert!(!configuration.record(&at(0, &fields)));
        assert_eq!(read(&configuration, config::ACTUAL), [1, 0, 0, 0]);
        // A VMM writes all fields, as it has read them once.
        configuration.record_written(&at(0, &[7; config::SIZE]));
        assert_eq!(read(&configuration, config::NUM_PAGES), [0; 4]);
        assert_eq!(read(&configuration, config::ACTUAL), [7; 4]);
        assert_eq!(read(&configuration, config::POISON_VAL), [7; 4]);
    }

    #[test]
    fn a_new_driver_reads_nothing_of_the_one_before() {
        let mut configuration = Configuration::default();
        configuration.record(&at(0, &[7; config::SIZE]));
        configuration.reset();
        for field in OF_THIS_DRIVER {
            assert_eq!(read(&configuration, field), [0; 4]);
        }
        assert_eq!(read(&configuration, config::POISON_VAL), [7; 4]);
    }
}
