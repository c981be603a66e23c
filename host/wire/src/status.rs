// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon's status, which a driver reports on the inflate queue (docs/protocol.md, section 4.6).

use std::mem::offset_of;

use thiserror::Error;

use crate::page_set::{field, has_command};
use crate::{VIRTIO_BALLOON_STATUS, virtio_balloon_status as Raw};

/// The size of a status in bytes.
pub const SIZE: usize = size_of::<Raw>();

/// What a driver reports of its balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The size in balloon pages.
    pub actual: u32,
    /// The stop reason, as in the configuration space.
    pub stop_reason: u32,
}

/// An error in a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// It has the wrong length.
    #[error("a status of {0} bytes")]
    Length(usize),
    /// A reserved field is not 0.
    #[error("a reserved field of a status is set")]
    Reserved,
}

impl Status {
    /// Whether a message is a status, by its command.
    pub fn is_in(message: &[u8]) -> bool {
        has_command(message, VIRTIO_BALLOON_STATUS)
    }

    /// Reads a status: all bytes that the driver has made readable in a buffer. Its command is known.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(message: &[u8]) -> Result<Self, Error> {
        let bytes: &[u8; SIZE] = message
            .try_into()
            .map_err(|_| Error::Length(message.len()))?;
        let number = |offset| u32::from_le_bytes(field(bytes, offset));
        let reserved = u16::from_le_bytes(field(bytes, offset_of!(Raw, reserved)));
        let request_id = u64::from_le_bytes(field(bytes, offset_of!(Raw, request_id)));
        if reserved != 0 || number(offset_of!(Raw, flags)) != 0 || request_id != 0 {
            return Err(Error::Reserved);
        }
        Ok(Self {
            actual: number(offset_of!(Raw, actual)),
            stop_reason: number(offset_of!(Raw, stop_reason)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status of 0x0102 pages with the stop reason 3.
    const BYTES: [u8; SIZE] = [
        8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0,
    ];

    #[test]
    fn a_status_has_a_size_and_a_reason() {
        assert!(Status::is_in(&BYTES));
        let status = Status {
            actual: 0x0102,
            stop_reason: 3,
        };
        assert_eq!(Status::parse(&BYTES), Ok(status));
    }

    #[test]
    fn other_messages_are_no_status() {
        for message in [&[][..], &[8], &[1, 0, 0, 0], &[0, 8]] {
            assert!(!Status::is_in(message), "{message:?}");
        }
    }

    #[test]
    fn a_malformed_status_is_refused() {
        assert_eq!(Status::parse(&BYTES[..16]), Err(Error::Length(16)));
        let long = [&BYTES[..], &[0]].concat();
        assert_eq!(Status::parse(&long), Err(Error::Length(SIZE + 1)));
        for place in 2..16 {
            let mut bytes = BYTES;
            bytes[place] = 1;
            assert_eq!(Status::parse(&bytes), Err(Error::Reserved), "{place}");
        }
    }
}
