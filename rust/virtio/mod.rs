// SPDX-License-Identifier: GPL-2.0

//! The virtio bus: drivers and devices, the configuration space, and virtqueues, for any kind of
//! device.

mod bus;
pub(crate) mod driver;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod fake_device;
mod queue;

pub(crate) use bus::*;
pub(crate) use driver::*;
pub(crate) use queue::*;
