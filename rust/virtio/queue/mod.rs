// SPDX-License-Identifier: GPL-2.0

//! Virtqueues and their buffers.

mod buffer;
mod find_vqs;
mod virtqueue;

pub(crate) use buffer::*;
pub(crate) use find_vqs::*;
pub(crate) use virtqueue::*;
