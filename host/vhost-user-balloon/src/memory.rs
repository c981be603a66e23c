// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory: what of it is in the balloon, what must not be discarded, and how it is returned to the host.

pub mod balloon;
mod bitmap;
pub mod discard;
pub mod hazard;
pub mod kept;
pub mod page_map;
mod pinning;
pub(crate) mod sweep;
