// SPDX-License-Identifier: GPL-2.0

//! Devices on the virtio bus, their features and their configuration space.

pub(super) mod binding;
mod config;
pub(super) mod device;
pub(super) mod feature_bit;
mod field;
pub(super) mod negotiation;
mod transport;

pub(crate) use binding::Handle;
pub(crate) use config::*;
pub(crate) use device::*;
pub(crate) use feature_bit::*;
pub(crate) use field::*;
pub(crate) use negotiation::*;
