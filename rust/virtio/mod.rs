// SPDX-License-Identifier: GPL-2.0

//! The virtio bus.

mod bus;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod fake_device;
pub(crate) mod virtqueue;

pub(crate) use bus::*;
