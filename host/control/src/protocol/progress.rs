// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What has become of a request that the guest was asked, and its answer.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::VariantArray;

/// The guest will be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The id of the request, as it is on the wire.
    pub id: u64,
}

/// How far the guest is with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The id of the request.
    pub id: u64,
    /// What has become of it.
    pub status: RequestStatus,
    /// How much unused memory the guest has named, in bytes.
    pub named: u64,
    /// How much of it was given back to the host, in bytes.
    pub discarded: u64,
}

/// What has become of a request (docs/protocol.md, section 5.1).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, VariantArray,
)]
#[serde(rename_all = "kebab-case")]
pub enum RequestStatus {
    /// The guest's driver has no buffer for it yet.
    Waiting,
    /// The guest has it.
    Open,
    /// It is done.
    Complete,
    /// The driver had to stop. What it has named until then holds.
    Aborted,
    /// The driver has stopped: the request was cancelled. What it has named until then holds.
    Cancelled,
    /// The driver does not know the command.
    Unsupported,
    /// The driver does not take what it was asked for.
    Malformed,
    /// The driver says that it knows of no such request.
    UnknownId,
    /// The driver, the guest or the VMM went away. What was named until then is not to be used.
    Reset,
}

impl RequestStatus {
    /// All of them. Each one is at the place of its number.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Whether nothing more will become of it.
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
    /// The address where the guest's memory ends.
    pub end: u64,
    /// An address and a number of bytes each, in ascending order.
    pub ranges: Vec<(u64, u64)>,
    /// Where the next range begins that there was no room for.
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
