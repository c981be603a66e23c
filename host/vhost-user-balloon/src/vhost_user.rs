// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of the vhost-user protocol, and the channel between the supervisor and its worker, which carries them.

pub mod channel;
pub mod message;
