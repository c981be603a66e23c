// SPDX-License-Identifier: GPL-2.0

//! The layer between the driver and the kernel's C: the only place with `unsafe`.
//!
//! It has the parts that the `kernel` crate lacks, in that crate's style. The layer has a safe
//! interface; the driver's own modules forbid `unsafe`.

#![allow(unsafe_code)]

// Only this module may use the generated bindings.
mod bindings;

pub(crate) mod fs;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
mod kunit;
pub(crate) mod mm;
pub(crate) mod notifiers;
pub(crate) mod right;
pub(crate) mod this_module;
pub(crate) mod trace;
pub(crate) mod virtio;
pub(crate) mod virtio_balloon;
pub(crate) mod work;
