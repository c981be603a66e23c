// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decides how the memory of a host is divided between its VMs.
//!
//! [`Policy::step`] takes an [`Observation`] of the host and its VMs and returns new targets for their balloons. It does
//! no I/O and reads no clock, and counts memory in whole pages: the same observations give the same actions.
//!
//! A step has four parts.
//!
//! 1. *Charge.* Each VM is charged what it can touch until its device reports something else. A raise that was sent
//!    counts at once, a cut only when the memory is back with the host.
//! 2. *Estimate.* What a guest needs is what it uses and some headroom, or more while it shows a sign of pressure.
//!    What it wants are its caches and its recent peak as well.
//! 3. *Divide.* The capacity is divided fairly, by weight: first the needs, and then what VMs want beyond them.
//! 4. *Move.* VMs below their share get memory, as far as it is free; VMs above it are asked for the difference.
//!
//! So what all guests may touch never exceeds the pool: no raise is sent against memory that another VM still has.

#![forbid(clippy::float_arithmetic)]

mod estimate;
mod fair;
mod observation;
mod policy;
mod progress;
mod tracker;

pub use fair::{Claim, share};
pub use observation::{
    Account, Action, Cause, Decision, GIB, HostPressure, MIB, Millis, Observation, Pages, Pressure,
    Release, Reservation, Sample, Settings, Spared, Stopped, Vm, VmId,
};
pub use policy::{Policy, Profile, Refusal};
