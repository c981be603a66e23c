// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of a host request, and its answer.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::VariantArray;

/// The request was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The id of the request, as in the wire protocol.
    pub id: u64,
}

/// The progress of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The id of the request.
    pub id: u64,
    /// Its status.
    pub status: RequestStatus,
    /// The unused memory that the guest has listed, in bytes.
    pub named: u64,
    /// The part of it that was returned to the host, in bytes.
    pub discarded: u64,
}

/// The status of a request (docs/protocol.md, section 5.1).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, VariantArray,
)]
#[serde(rename_all = "kebab-case")]
pub enum RequestStatus {
    /// The guest's driver has not provided a buffer for it yet.
    Waiting,
    /// The guest has received it.
    Open,
    /// It is done.
    Complete,
    /// The driver had to stop. The memory listed so far is valid.
    Aborted,
    /// The request was cancelled. The memory listed so far is valid.
    Cancelled,
    /// The driver does not know the command.
    Unsupported,
    /// The driver refuses a field of the request.
    Malformed,
    /// The driver knows no request with this id.
    UnknownId,
    /// The driver, the guest or the VMM was reset. The listed memory must not be used.
    Reset,
}

impl RequestStatus {
    /// All of them. The index of each is its number.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Whether it is final.
    pub const fn is_end(self) -> bool {
        match self {
            Self::Waiting | Self::Open => false,
            Self::Complete
            | Self::Aborted
            | Self::Cancelled
            | Self::Unsupported
            | Self::Malformed
            | Self::UnknownId
            | Self::Reset => true,
        }
    }
}

impl fmt::Display for RequestStatus {
    /// Writes its name on the socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Unused memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranges {
    /// The id of the request.
    pub id: u64,
    /// The end of the guest's memory.
    pub end: u64,
    /// An address and a number of bytes each, in ascending order.
    pub ranges: Vec<(u64, u64)>,
    /// The start of the next range, if there was no room for it.
    pub next: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_have_their_names() {
        assert_eq!(RequestStatus::UnknownId.to_string(), "unknown-id");
        assert!(RequestStatus::Reset.is_end() && !RequestStatus::Open.is_end());
    }
}
