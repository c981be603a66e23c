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
}

impl ControlError {
    /// An error of a kind, with its message and its remedy.
    pub fn new(kind: ErrorKind, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            advice: advice.into(),
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
    /// The guest's driver has not negotiated the feature that this needs.
    Unsupported,
    /// The guest did not answer in time.
    Timeout,
    /// The request is not one of this protocol.
    BadRequest,
    /// Anything else.
    Failed,
}
