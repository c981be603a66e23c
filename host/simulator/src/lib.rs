// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules of other projects that divide a host's memory between its VMs, and this project's, for simulated guests and
//! for real ones.

pub mod rules;
