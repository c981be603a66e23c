// SPDX-License-Identifier: GPL-2.0

//! Tracepoints, under `events/virtio_balloon_rs` in tracefs. They cost a call while they are
//! disabled. The kernel crate's `declare_trace!` would test a static key instead, but it looks for
//! the tracepoints in that crate's bindings, where those of a module are not.
//!
//! C header: `trace.h`

use crate::rust::bindings;

/// `pages` kernel pages were sent to the device `virtio<device>`, which has not used the message
/// yet.
pub(crate) fn inflate(device: u32, pages: usize) {
    bindings::rust_do_trace_virtio_balloon_rs_inflate(device, pages);
}

/// The reason of a deflate.
#[derive(Clone, Copy)]
pub(crate) enum Reason {
    /// The target.
    Target,
    /// The guest has run out of memory.
    OutOfMemory,
    /// The kernel has isolated their memory.
    Isolated,
}

/// `pages` kernel pages left the balloon of `virtio<device>`.
pub(crate) fn deflate(device: u32, pages: usize, reason: Reason) {
    let reason = match reason {
        Reason::Target => bindings::BALLOON_RS_TARGET,
        Reason::OutOfMemory => bindings::BALLOON_RS_OUT_OF_MEMORY,
        Reason::Isolated => bindings::BALLOON_RS_ISOLATED,
    };

    bindings::rust_do_trace_virtio_balloon_rs_deflate(device, pages, reason);
}

/// The device `virtio<device>` has made the request `id`.
pub(crate) fn request(device: u32, id: u64, command: u16) {
    bindings::rust_do_trace_virtio_balloon_rs_request(device, id, command);
}

/// A message of the answer to the request `id` was sent, with `pages` kernel pages; or, with a
/// `status` other than 0, the last one.
pub(crate) fn answer(device: u32, id: u64, pages: usize, status: u8) {
    bindings::rust_do_trace_virtio_balloon_rs_answer(device, id, pages, status);
}
