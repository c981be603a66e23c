// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::progress::RequestStatus;

/// The counts since the worker process started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Memory that the guest has inflated, in bytes.
    pub inflated: u64,
    /// Memory that the guest has deflated, in bytes.
    pub deflated: u64,
    /// Memory returned to the host, in bytes.
    pub discarded: u64,
    /// Calls that returned memory.
    pub discards: u64,
    /// Failed calls.
    pub discard_failures: u64,
    /// How many times the host had no memory for deflated pages.
    #[serde(default)]
    pub prefault_failures: u64,
    /// Memory that the guest listed and that must not be returned to the host, in bytes.
    #[serde(default)]
    pub withheld: u64,
    /// The time spent on returning memory, in microseconds.
    pub discarding: u64,
    /// The time spent on decoding messages of the inflate queue, in microseconds.
    pub translating: u64,
    /// Memory that the guest has reported as free, in bytes.
    pub reported: u64,
    /// Memory that the guest has hinted as free, in bytes.
    pub hinted: u64,
    /// Memory that the guest has listed as unused in answers, in bytes.
    pub unused: u64,
    /// Host requests.
    pub asked: u64,
    /// Ended host requests, by status.
    pub answered: BTreeMap<RequestStatus, u64>,
    /// Messages of the guest.
    pub messages: ByQueue,
    /// Notifications of messages. One may announce several messages, and a few arrive when a queue is set
    /// up.
    pub notifications: ByQueue,
    /// The size of messages that list pages, in bytes.
    pub received: Received,
    /// How many messages named pages, by their encoding: `pfns` are arrays of page frame numbers, the others page sets.
    pub encodings: BTreeMap<String, u64>,
    /// Refused messages, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// Counts by queue. A daemon may know fewer queues than its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ByQueue {
    /// Of the inflate queue.
    pub inflate: u64,
    /// Of the deflate queue.
    pub deflate: u64,
    /// Of the statistics queue.
    pub stats: u64,
    /// Of the free page hinting queue.
    pub hints: u64,
    /// Of the free page reporting queue.
    pub reports: u64,
    /// Of the queue for host requests.
    pub requests: u64,
}

impl ByQueue {
    /// The numbers, each with the name of its queue.
    pub fn named(self) -> [(&'static str, u64); 6] {
        let Self {
            inflate,
            deflate,
            stats,
            hints,
            reports,
            requests,
        } = self;
        [
            ("inflate", inflate),
            ("deflate", deflate),
            ("stats", stats),
            ("hints", hints),
            ("reports", reports),
            ("requests", requests),
        ]
    }
}

/// The size of all messages that list pages, by queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Of the inflate queue, in bytes.
    pub inflate: u64,
    /// Of the deflate queue, in bytes.
    pub deflate: u64,
    /// Of the queue for host requests, in bytes.
    pub requests: u64,
}
