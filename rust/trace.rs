// SPDX-License-Identifier: GPL-2.0

//! Tracepoints, which are to be found under `events/virtio_balloon_rs` in tracefs. They cost
//! nothing worth mentioning while nobody looks.
//!
//! C header: `trace.h`

use super::bindings;

/// `pages` kernel pages went to the device `virtio<device>`, which has not answered yet.
pub(crate) fn inflate(device: u32, pages: usize) {
    // SAFETY: The function takes numbers, whatever they are.
    unsafe { bindings::balloon_rs_trace_inflate(device, pages) }
}

/// `pages` kernel pages left the balloon of `virtio<device>`: because of its target, or because the
/// guest has run out of memory.
pub(crate) fn deflate(device: u32, pages: usize, out_of_memory: bool) {
    // SAFETY: As above.
    unsafe { bindings::balloon_rs_trace_deflate(device, pages, out_of_memory) }
}

/// The device `virtio<device>` has made the request `id`.
pub(crate) fn request(device: u32, id: u64, command: u16) {
    // SAFETY: As above.
    unsafe { bindings::balloon_rs_trace_request(device, id, command) }
}

/// A part of the answer to the request `id` was sent, which names `pages` kernel pages; or, with a
/// `status` that is not 0, the last one.
pub(crate) fn answer(device: u32, id: u64, pages: usize, status: u8) {
    // SAFETY: As above.
    unsafe { bindings::balloon_rs_trace_answer(device, id, pages, status) }
}
