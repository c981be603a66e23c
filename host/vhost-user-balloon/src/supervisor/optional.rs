// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of optional parts of the protocol that this daemon does not offer. A front end that sends them all the same
//! gets a refusal, and the guest keeps its balloon.

use vhost::vhost_user::message::FrontendReq as Request;

use crate::vhost_user::message::Message;

/// An answer that something has failed.
const FAILED: [u8; 8] = 1_u64.to_ne_bytes();

/// The same, without a file descriptor.
const FAILED_ALONE: [u8; 8] = 0x101_u64.to_ne_bytes();

/// No buffers in flight.
const NOTHING: [u8; 24] = [0; 24];

/// A message that is not offered.
pub(super) struct Optional {
    request: Request,
    /// Its name in the specification.
    pub(super) name: &'static str,
    /// The feature of the protocol that it belongs to.
    pub(super) feature: &'static str,
    /// The body of the refusal if the front end waits for an answer.
    refusal: Option<&'static [u8]>,
}

const fn message(
    request: Request,
    name: &'static str,
    feature: &'static str,
    refusal: Option<&'static [u8]>,
) -> Optional {
    Optional {
        request,
        name,
        feature,
        refusal,
    }
}

#[rustfmt::skip]
const ALL: [Optional; 9] = [
    message(Request::SET_LOG_BASE, "SET_LOG_BASE", "LOG_SHMFD", None),
    message(Request::SET_LOG_FD, "SET_LOG_FD", "LOG_SHMFD", None),
    message(Request::POSTCOPY_ADVISE, "POSTCOPY_ADVISE", "PAGEFAULT", Some(&[])),
    message(Request::POSTCOPY_LISTEN, "POSTCOPY_LISTEN", "PAGEFAULT", None),
    message(Request::POSTCOPY_END, "POSTCOPY_END", "PAGEFAULT", Some(&FAILED)),
    message(Request::GET_INFLIGHT_FD, "GET_INFLIGHT_FD", "INFLIGHT_SHMFD", Some(&NOTHING)),
    message(Request::SET_INFLIGHT_FD, "SET_INFLIGHT_FD", "INFLIGHT_SHMFD", None),
    message(Request::SET_DEVICE_STATE_FD, "SET_DEVICE_STATE_FD", "DEVICE_STATE", Some(&FAILED_ALONE)),
    message(Request::CHECK_DEVICE_STATE, "CHECK_DEVICE_STATE", "DEVICE_STATE", Some(&FAILED)),
];

/// What a message is, if it is one of these.
pub(super) fn find(message: &Message) -> Option<&'static Optional> {
    let same = |optional: &&Optional| optional.request as u32 == message.request();
    ALL.iter().find(same)
}

/// The refusal of a message that has an answer.
pub(super) fn refusal(message: &Message) -> Option<Message> {
    let body = find(message)?.refusal?;
    Some(message.answer(body))
}
