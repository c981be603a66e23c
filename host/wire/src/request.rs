// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host requests, and the messages of their answers (docs/protocol.md, section 5).

use std::mem::offset_of;

use thiserror::Error;

use crate::page_set::{self, PageSet, field, has_command};
use crate::{
    VIRTIO_BALLOON_CACHES_PAGES, VIRTIO_BALLOON_CACHES_SLAB, VIRTIO_BALLOON_COMPLETION,
    VIRTIO_BALLOON_COMPLETION_ABORTED, VIRTIO_BALLOON_COMPLETION_CANCELLED,
    VIRTIO_BALLOON_COMPLETION_COMPLETE, VIRTIO_BALLOON_COMPLETION_MALFORMED,
    VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID, VIRTIO_BALLOON_COMPLETION_UNSUPPORTED,
    VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD, VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP,
    VIRTIO_BALLOON_REQUEST_CANCEL, VIRTIO_BALLOON_REQUEST_DROP_CACHES,
    virtio_balloon_completion as RawCompletion, virtio_balloon_request as RawRequest,
};

/// The size of a request in bytes.
pub const SIZE: usize = size_of::<RawRequest>();

/// The size of a completion in bytes.
pub const COMPLETION_SIZE: usize = size_of::<RawCompletion>();

/// The range and block size of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The binary logarithm of the size in bytes of the smallest block that is worth an answer.
    pub block_shift: u8,
    /// The first address, in bytes.
    pub start: u64,
    /// The end address in bytes, or 0 for the end of memory.
    pub end: u64,
}

/// A request of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Pages that were unused at some moment after the driver had seen the request.
    UnusedSkip(Wanted),
    /// Pages that are unused until the device has used the buffer that names them.
    UnusedDiscard(Wanted),
    /// Drop caches.
    DropCaches {
        /// The page cache.
        pages: bool,
        /// The slab caches of names and inodes.
        slab: bool,
    },
    /// Cancel another request.
    Cancel {
        /// Its id.
        id: u64,
    },
}

impl Command {
    /// The request in its wire format, with 0 in fields that are not in use (HR-V2).
    pub fn encode(self, id: u64) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            let field = bytes
                .get_mut(offset..)
                .and_then(|rest| rest.get_mut(..value.len()));
            if let Some(field) = field {
                field.copy_from_slice(value);
            }
        };
        let number = match self {
            Self::UnusedSkip(_) => VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP,
            Self::UnusedDiscard(_) => VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD,
            Self::DropCaches { .. } => VIRTIO_BALLOON_REQUEST_DROP_CACHES,
            Self::Cancel { .. } => VIRTIO_BALLOON_REQUEST_CANCEL,
        };
        // The command is in the lower half of the first four bytes, and fits into it.
        put(offset_of!(RawRequest, command), &number.to_le_bytes()[..2]);
        put(offset_of!(RawRequest, request_id), &id.to_le_bytes());
        match self {
            Self::UnusedSkip(wanted) | Self::UnusedDiscard(wanted) => {
                put(offset_of!(RawRequest, block_shift), &[wanted.block_shift]);
                put(offset_of!(RawRequest, start), &wanted.start.to_le_bytes());
                put(offset_of!(RawRequest, end), &wanted.end.to_le_bytes());
            }
            Self::DropCaches { pages, slab } => {
                let bit = |wanted: bool, bit: u32| if wanted { bit } else { 0 };
                let caches =
                    bit(pages, VIRTIO_BALLOON_CACHES_PAGES) | bit(slab, VIRTIO_BALLOON_CACHES_SLAB);
                put(offset_of!(RawRequest, caches), &caches.to_le_bytes());
            }
            Self::Cancel { id } => put(offset_of!(RawRequest, start), &id.to_le_bytes()),
        }
        bytes
    }

    /// The purpose of the pages in an answer, or nothing if it has none.
    pub fn names(self) -> Option<page_set::Command> {
        match self {
            Self::UnusedSkip(_) => Some(page_set::Command::UnusedSkip),
            Self::UnusedDiscard(_) => Some(page_set::Command::UnusedDiscard),
            Self::DropCaches { .. } | Self::Cancel { .. } => None,
        }
    }
}

/// The status of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Complete,
    /// Incomplete. The page sets sent so far are valid.
    Aborted,
    /// The same, because of a cancel.
    Cancelled,
    /// The driver does not know the command.
    Unsupported,
    /// A field has no legal value.
    Malformed,
    /// A cancel of a request that is not open.
    UnknownId,
}

/// The last message of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The status.
    pub status: Status,
    /// The id of the request, which is not 0.
    pub request_id: u64,
}

/// An error in a message of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// It is no page set.
    #[error(transparent)]
    PageSet(#[from] page_set::Error),
    /// A completion has the wrong length.
    #[error("a completion of {0} bytes")]
    Length(usize),
    /// The status has no meaning.
    #[error("there is no status {0}")]
    Status(u8),
    /// A reserved bit or field is not 0.
    #[error("a reserved bit of a completion is set")]
    Reserved,
    /// The request id is 0.
    #[error("a completion of no request")]
    RequestId,
}

impl Completion {
    /// Reads a completion: all bytes that the driver has made readable in a buffer.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(message: &[u8]) -> Result<Self, Error> {
        let bytes: &[u8; COMPLETION_SIZE] = message
            .try_into()
            .map_err(|_| Error::Length(message.len()))?;
        let command = u16::from_le_bytes(field(bytes, offset_of!(RawCompletion, command)));
        let [status] = field(bytes, offset_of!(RawCompletion, status));
        let [reserved] = field(bytes, offset_of!(RawCompletion, reserved));
        let flags = u32::from_le_bytes(field(bytes, offset_of!(RawCompletion, flags)));
        let request_id = u64::from_le_bytes(field(bytes, offset_of!(RawCompletion, request_id)));
        if u32::from(command) != VIRTIO_BALLOON_COMPLETION {
            return Err(page_set::Error::Command(command).into());
        }
        if reserved != 0 || flags != 0 {
            return Err(Error::Reserved);
        }
        if request_id == 0 {
            return Err(Error::RequestId);
        }
        let status = match u32::from(status) {
            VIRTIO_BALLOON_COMPLETION_COMPLETE => Status::Complete,
            VIRTIO_BALLOON_COMPLETION_ABORTED => Status::Aborted,
            VIRTIO_BALLOON_COMPLETION_CANCELLED => Status::Cancelled,
            VIRTIO_BALLOON_COMPLETION_UNSUPPORTED => Status::Unsupported,
            VIRTIO_BALLOON_COMPLETION_MALFORMED => Status::Malformed,
            VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID => Status::UnknownId,
            _ => return Err(Error::Status(status)),
        };
        Ok(Self { status, request_id })
    }
}

/// A message of an answer.
#[derive(Clone, Debug)]
pub enum Message<'a> {
    /// Pages.
    Pages(PageSet<'a>),
    /// Its end.
    Completion(Completion),
}

impl<'a> Message<'a> {
    /// Reads a message: all bytes that the driver has made readable in a buffer.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(message: &'a [u8]) -> Result<Self, Error> {
        if has_command(message, VIRTIO_BALLOON_COMPLETION) {
            Ok(Self::Completion(Completion::parse(message)?))
        } else {
            Ok(Self::Pages(PageSet::parse(message)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    const WANTED: Wanted = Wanted {
        block_shift: 21,
        start: 0x1_0000_0000,
        end: 0x0203_0405_0607_0809,
    };

    fn words(bytes: [u8; SIZE]) -> [u64; 4] {
        let word = |n: usize| u64::from_le_bytes(field(&bytes, 8 * n));
        [word(0), word(1), word(2), word(3)]
    }

    #[test]
    fn requests_are_as_specified() {
        let caches = |pages, slab| Command::DropCaches { pages, slab };
        for (command, expected) in [
            (
                Command::UnusedSkip(WANTED),
                [3 | (21 << 16), 9, WANTED.start, WANTED.end],
            ),
            (
                Command::UnusedDiscard(WANTED),
                [4 | (21 << 16), 9, WANTED.start, WANTED.end],
            ),
            (caches(true, false), [5 | (1 << 32), 9, 0, 0]),
            (caches(false, true), [5 | (2 << 32), 9, 0, 0]),
            (caches(true, true), [5 | (3 << 32), 9, 0, 0]),
            (Command::Cancel { id: 7 }, [6, 9, 7, 0]),
        ] {
            assert_eq!(words(command.encode(9)), expected, "{command:?}");
        }
    }

    /// A completion with these values.
    fn completion(command: u16, status: u8, reserved: u8, flags: u32, id: u64) -> Vec<u8> {
        let first = u64::from(command)
            | (u64::from(status) << 16)
            | (u64::from(reserved) << 24)
            | (u64::from(flags) << 32);
        [first.to_le_bytes(), id.to_le_bytes()].concat()
    }

    #[test]
    fn completions_are_read() {
        for (number, status) in (1..).zip([
            Status::Complete,
            Status::Aborted,
            Status::Cancelled,
            Status::Unsupported,
            Status::Malformed,
            Status::UnknownId,
        ]) {
            let request_id = u64::MAX - u64::from(number);
            let expected = Completion { status, request_id };
            let bytes = completion(7, number, 0, 0, request_id);
            assert_eq!(Completion::parse(&bytes), Ok(expected));
            assert!(matches!(
                Message::parse(&bytes),
                Ok(Message::Completion(read)) if read == expected
            ));
        }
    }

    #[test]
    fn what_is_no_completion_is_refused() {
        for (bytes, error) in [
            (completion(7, 0, 0, 0, 1), Error::Status(0)),
            (completion(7, 7, 0, 0, 1), Error::Status(7)),
            (completion(7, 1, 1, 0, 1), Error::Reserved),
            (completion(7, 1, 0, 1, 1), Error::Reserved),
            (completion(7, 1, 0, 0, 0), Error::RequestId),
            (completion(7, 1, 0, 0, 1)[..15].to_vec(), Error::Length(15)),
            (
                [completion(7, 1, 0, 0, 1), vec![0]].concat(),
                Error::Length(17),
            ),
            (vec![7, 0], Error::Length(2)),
            (vec![7], page_set::Error::Truncated.into()),
            (vec![], page_set::Error::Truncated.into()),
            (
                [completion(8, 1, 0, 0, 1), vec![0; 16]].concat(),
                page_set::Error::Command(8).into(),
            ),
        ] {
            assert_eq!(Message::parse(&bytes).unwrap_err(), error, "{bytes:?}");
        }
        let other = completion(8, 1, 0, 0, 1);
        assert_eq!(
            Completion::parse(&other),
            Err(page_set::Error::Command(8).into())
        );
    }

    #[test]
    fn page_sets_are_told_from_completions() {
        let header: [u64; 5] = [
            3 | (12 << 16) | (1 << 24) | (1 << 32),
            9,
            0,
            1,
            (5 << 12) | 1,
        ];
        let bytes = header.map(u64::to_le_bytes).concat();
        let Ok(Message::Pages(set)) = Message::parse(&bytes) else {
            panic!("no page set");
        };
        assert_eq!((set.request_id, set.more, set.count), (9, true, 1));
        assert_eq!(Some(set.command), Command::UnusedSkip(WANTED).names());
    }

    proptest! {
        /// Any bytes are either a message or an error, and all bytes of a completion count.
        #[test]
        fn a_completion_has_one_encoding(bytes in vec(any::<u8>(), 0..40)) {
            if let Ok(Message::Completion(read)) = Message::parse(&bytes) {
                let status = bytes[2];
                prop_assert_eq!(completion(7, status, 0, 0, read.request_id), bytes);
            }
        }
    }
}
