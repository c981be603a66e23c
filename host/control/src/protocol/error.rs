// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a request is refused.

use serde::{Deserialize, Serialize};

/// Why the daemon refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub kind: ErrorKind,
    /// The error, for people.
    pub message: String,
    /// The remedy, for people.
    pub advice: String,
    /// The target that is in force, in bytes, if the kind is [`Conflict`](ErrorKind::Conflict).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<u64>,
}

impl ControlError {
    /// An error of a kind, with its message and its remedy.
    pub fn new(kind: ErrorKind, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            advice: advice.into(),
            target: None,
        }
    }
}

/// The kind of an error, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// No VMM is connected.
    NoGuest,
    /// No driver in the guest works with the device.
    NoDriver,
    /// A number is too large or too small.
    OutOfRange,
    /// Another target is in force than the client expects.
    Conflict,
    /// The guest's driver has not negotiated the feature that this needs.
    Unsupported,
    /// The guest did not answer in time.
    Timeout,
    /// The request is not one of this protocol.
    BadRequest,
    /// Anything else.
    Failed,
}
