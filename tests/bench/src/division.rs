// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a host's memory was divided between its guests. Amounts of memory are in MiB.

use serde::{Deserialize, Serialize};

/// How a host's memory was divided between guests while they ran jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Division {
    /// The memory for all guests.
    pub pool: f64,
    /// The most that they had of the host's memory.
    pub most: f64,
    /// What they had on average.
    pub mean: f64,
    /// What they would have had on average if each had what it used, and a headroom.
    pub needed: f64,
    /// The part of the time in which they had more than the pool.
    pub above: f64,
    /// How many processes the guests killed for lack of memory.
    pub kills: u64,
    /// The part of the time in which processes of a guest waited for memory.
    pub stalled: f64,
    /// How many times a guest's target changed in a minute.
    pub changes: f64,
    /// All of it over time, with the first phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// The memory of guests over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// The time between two points, in seconds.
    pub step: f64,
    /// When each phase began, in seconds, and its name.
    pub phases: Vec<(f64, String)>,
    /// The guests.
    pub guests: Vec<Track>,
    /// The most that all guests had of the host's memory, in each step.
    pub all: Vec<f64>,
}

/// The memory of a guest over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Track {
    /// What it used.
    pub used: Vec<f64>,
    /// What its balloon left to it.
    pub granted: Vec<f64>,
    /// What it had of the host's memory.
    pub resident: Vec<f64>,
}
