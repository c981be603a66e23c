// SPDX-License-Identifier: GPL-2.0

//! The virtio bus: drivers and devices, the configuration space, and virtqueues. Nothing in here is
//! about balloons.

mod binding;
mod buffer;
mod config;
mod device;
pub(crate) mod driver;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod fake_device;
mod feature;
mod field;
mod find_vqs;
mod negotiation;
mod transport;
mod virtqueue;

pub(crate) use buffer::*;
pub(crate) use config::*;
pub(crate) use device::*;
pub(crate) use driver::*;
pub(crate) use feature::*;
pub(crate) use field::*;
pub(crate) use find_vqs::*;
pub(crate) use negotiation::*;
pub(crate) use virtqueue::*;
