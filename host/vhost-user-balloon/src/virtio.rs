// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the specification and the extension define: queues, feature bits, and the configuration space.

pub mod config;
pub mod features;
pub mod kind;
