// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::progress::RequestStatus;

/// What has been counted since the daemon was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// What the guest has put into the balloon, in bytes.
    pub inflated: u64,
    /// What the guest has taken out of the balloon, in bytes.
    pub deflated: u64,
    /// What was given back to the host, in bytes.
    pub discarded: u64,
    /// How many times memory was given back.
    pub discards: u64,
    /// How many times that failed.
    pub discard_failures: u64,
    /// How many times the host had no memory for what the guest takes back.
    #[serde(default)]
    pub prefault_failures: u64,
    /// What must not be given back to the host and was named all the same, in bytes.
    #[serde(default)]
    pub withheld: u64,
    /// How long giving memory back has taken, in microseconds.
    pub discarding: u64,
    /// How long it has taken to find out which memory the messages of the inflate queue name, in microseconds.
    pub translating: u64,
    /// What the guest has reported as free, in bytes.
    pub reported: u64,
    /// What the guest has hinted as free, in bytes.
    pub hinted: u64,
    /// What the guest has named as unused when it was asked, in bytes.
    pub unused: u64,
    /// How many requests the guest was asked.
    pub asked: u64,
    /// How many of them have ended, by how they did.
    pub answered: BTreeMap<RequestStatus, u64>,
    /// How many messages came from the guest.
    pub messages: ByQueue,
    /// How many times the device was notified of messages. Several that come at once count as one, and a few
    /// come when a queue is set up.
    pub notifications: ByQueue,
    /// How much was received to name pages, in bytes.
    pub received: Received,
    /// How many messages named pages, by their encoding: `pfns` are arrays of page frame numbers, the others page sets.
    pub encodings: BTreeMap<String, u64>,
    /// How many messages were refused, by the reason.
    pub refused: BTreeMap<String, u64>,
}

/// How many there were, by the queue. A daemon may know fewer queues than its client.
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

/// How long all messages were that name pages, by the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Of the inflate queue, in bytes.
    pub inflate: u64,
    /// Of the deflate queue, in bytes.
    pub deflate: u64,
    /// Of the queue for host requests, in bytes.
    pub requests: u64,
}
