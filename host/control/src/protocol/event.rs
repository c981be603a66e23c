// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The events of a subscription.

use serde::{Deserialize, Serialize};

use super::info::Info;
use super::stats::Stats;

/// An event of a subscription. Later versions may add events. Clients ignore events that they do not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The state of the balloon or of the guest has changed.
    Info(Info),
    /// The guest has sent statistics.
    Stats(Stats),
    /// Nothing has changed for a second.
    Alive {},
}
