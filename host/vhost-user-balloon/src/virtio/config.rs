// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration space (specification, clause 5.5.4).

use balloon_control::Shortfall;
use balloon_wire::status::Status;
use balloon_wire::{
    BALLOON_PAGE_SIZE, VIRTIO_BALLOON_STOP_REASON_AFTER_OOM, VIRTIO_BALLOON_STOP_REASON_EXCLUDED,
    VIRTIO_BALLOON_STOP_REASON_FLOOR, VIRTIO_BALLOON_STOP_REASON_NO_MEMORY, config,
};

/// The fields that are stored, and not computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    /// The host's target in balloon pages.
    pub target: u32,
    /// The balloon size in balloon pages, as the guest reports it.
    pub actual: u32,
    /// The value of the guest's free pages.
    pub poison_val: u32,
    /// The guest's stop reason.
    pub stop_reason: u32,
}

impl Default for Fields {
    /// Until the guest has sent the value of its free pages, the daemon assumes that they have one:
    /// a daemon without earlier state must not discard them.
    fn default() -> Self {
        Self {
            target: 0,
            actual: 0,
            poison_val: u32::MAX,
            stop_reason: 0,
        }
    }
}

impl Fields {
    /// The content for the driver.
    ///
    /// `target` is the current target in balloon pages, `hint_command` the command id of free page hinting, and
    /// `granule` the device's granule in bytes.
    pub fn read(&self, target: u32, hint_command: u32, granule: u32) -> [u8; config::SIZE] {
        let mut bytes = [0; config::SIZE];
        for (offset, value) in [
            (config::NUM_PAGES, target),
            (config::ACTUAL, self.actual),
            (config::FREE_PAGE_HINT_CMD_ID, hint_command),
            (config::POISON_VAL, self.poison_val),
            (config::DISCARD_GRANULE, granule),
            (config::STOP_REASON, self.stop_reason),
        ] {
            if let Some(field) = bytes.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
                *field = value.to_le_bytes();
            }
        }
        bytes
    }

    /// Handles a write of the driver.
    ///
    /// Whatever the driver writes, QEMU sends all of its own copy, with a target that may be stale.
    /// So the device takes only the driver's fields, and only whole ones. If the driver reports in messages, which
    /// `has_status` says, the poison value is the only one.
    pub fn write(&mut self, offset: usize, bytes: &[u8], has_status: bool) {
        for (place, field, is_written) in [
            (config::ACTUAL, &mut self.actual, !has_status),
            (config::POISON_VAL, &mut self.poison_val, true),
            (config::STOP_REASON, &mut self.stop_reason, !has_status),
        ] {
            if !is_written {
                continue;
            }
            let written = place
                .checked_sub(offset)
                .and_then(|start| bytes.get(start..))
                .and_then(<[u8]>::first_chunk);
            if let Some(value) = written {
                *field = u32::from_le_bytes(*value);
            }
        }
    }

    /// Sets what the driver has reported in a message.
    pub fn set_status(&mut self, status: Status) {
        (self.actual, self.stop_reason) = (status.actual, status.stop_reason);
    }

    /// The guest's stop reason, if it has one.
    pub fn shortfall(&self) -> Option<Shortfall> {
        match self.stop_reason {
            VIRTIO_BALLOON_STOP_REASON_FLOOR => Some(Shortfall::Floor),
            VIRTIO_BALLOON_STOP_REASON_NO_MEMORY => Some(Shortfall::NoMemory),
            VIRTIO_BALLOON_STOP_REASON_AFTER_OOM => Some(Shortfall::AfterOom),
            VIRTIO_BALLOON_STOP_REASON_EXCLUDED => Some(Shortfall::Excluded),
            _ => None,
        }
    }
}

/// Balloon pages in bytes.
pub fn bytes(pages: u32) -> u64 {
    u64::from(pages) * BALLOON_PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_have_their_places() {
        let fields = Fields {
            target: 1,
            actual: 2,
            poison_val: 4,
            stop_reason: 6,
        };
        let bytes = fields.read(1, 3, 5);
        let values = bytes
            .chunks(4)
            .map(|field| u32::from_le_bytes(field.try_into().unwrap()));
        assert_eq!(values.collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn only_the_guests_fields_are_written() {
        let mut fields = Fields::default();
        fields.write(0, &[0xff; 24], false);
        assert_eq!(fields.target, 0);
        assert_eq!((fields.actual, fields.stop_reason), (u32::MAX, u32::MAX));
        fields.write(4, &7_u32.to_le_bytes(), false);
        assert_eq!(fields.actual, 7);
        // Half a field.
        fields.write(4, &[1, 2], false);
        fields.write(6, &[1, 2], false);
        assert_eq!(fields.actual, 7);
        // A driver that sends its status writes only the poison value.
        fields.write(0, &[1; 24], true);
        assert_eq!((fields.actual, fields.stop_reason), (7, u32::MAX));
        assert_eq!(fields.poison_val, 0x0101_0101);
    }

    #[test]
    fn reasons_have_names() {
        let reason = |stop_reason| {
            Fields {
                stop_reason,
                ..Fields::default()
            }
            .shortfall()
        };
        assert_eq!(reason(0), None);
        assert_eq!(reason(1), Some(Shortfall::Floor));
        assert_eq!(reason(2), Some(Shortfall::NoMemory));
        assert_eq!(reason(3), Some(Shortfall::AfterOom));
        assert_eq!(reason(4), Some(Shortfall::Excluded));
        assert_eq!(reason(5), None);
    }

    proptest! {
        /// Writing back the read bytes changes nothing, wherever they are cut.
        #[test]
        fn what_was_read_can_be_written(
            actual: u32, poison_val: u32, stop_reason: u32, start in 0_usize..32, end in 0_usize..32,
        ) {
            let mut fields = Fields { target: 9, actual, poison_val, stop_reason };
            let before = fields.clone();
            let bytes = fields.read(9, 1, 2);
            fields.write(start, bytes.get(start..end.min(24)).unwrap_or_default(), false);
            prop_assert_eq!(&fields, &before);
            let mut other = Fields { target: 9, ..Fields::default() };
            other.write(0, &bytes, false);
            prop_assert_eq!(other, before);
        }
    }
}
