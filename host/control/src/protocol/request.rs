// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The requests of clients.
//!
//! Unknown fields are errors, so that a misspelt field is not taken for an omitted one.

use serde::{Deserialize, Serialize};

/// A request of a client.
// The braces are for serde: it lets a unit variant have any fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of the balloon and of the guest, answered with [`Info`](crate::Info).
    Info {},
    /// Subscribe to the events of the device, answered with [`Response::Subscribed`](crate::Response::Subscribed) and
    /// then with [`Event`](crate::Event)s until the client disconnects.
    Subscribe {
        /// Request statistics at least this often, in milliseconds: 50 to 3600000. The daemon uses the shortest interval
        /// of all subscribers, and its own one if that is shorter.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stats_milliseconds: Option<u64>,
    },
    /// Set the target, answered with [`Response::Done`](crate::Response::Done).
    Set {
        /// The new target in bytes.
        bytes: u64,
        /// The target that must be in force, in bytes. With another one this changes nothing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expected: Option<u64>,
        /// For how long the target is in force, in milliseconds: 100 to 86400000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<u64>,
        /// The target after that, in bytes. By default it is the one before the lease.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fallback: Option<u64>,
        /// The name of the program that takes the lease, 1 to 64 bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
        /// By how many bytes the daemon may lower the target by itself, at a pressure notice of the guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        release: Option<u64>,
    },
    /// The guest's memory statistics, answered with [`Stats`](crate::Stats).
    Stats {
        /// Request new ones from the guest and wait for them, instead of the newest so far.
        fresh: bool,
    },
    /// Set the interval of statistics requests, answered with
    /// [`Response::Done`](crate::Response::Done).
    SetStatsInterval {
        /// The time between two samples in seconds. 0 stops the requests.
        seconds: u32,
    },
    /// Stop returning memory to the host for a time, whatever the guest sends; answered with
    /// [`Response::Done`](crate::Response::Done).
    Inhibit {
        /// The time in seconds: 1 to 86400.
        seconds: u64,
        /// The name of the owner, 1 to 64 bytes, by which it can be ended alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
    },
    /// Return memory to the host again, answered with [`Response::Done`](crate::Response::Done).
    Resume {
        /// End only the `inhibit` of this owner.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
    },
    /// Free page hinting. [`HintAction::Start`] is answered with [`Begun`](crate::Begun), the others with
    /// [`Response::Done`](crate::Response::Done).
    Hints {
        /// What to do.
        action: HintAction,
    },
    /// Request a list of the guest's unused memory, for a copy that leaves it out; answered with
    /// [`Begun`](crate::Begun).
    Unused {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address at which to stop, or 0 for the end of memory.
        end: u64,
    },
    /// Request unused memory from the guest, and return it to the host; answered with
    /// [`Begun`](crate::Begun).
    Reclaim {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address at which to stop, or 0 for the end of memory.
        end: u64,
    },
    /// Request that the guest drops caches, answered with [`Begun`](crate::Begun).
    DropCaches {
        /// The page cache.
        pages: bool,
        /// The slab caches of names and inodes.
        slab: bool,
    },
    /// The progress of a request, answered with [`Progress`](crate::Progress).
    Progress {
        /// The id of the request.
        id: u64,
    },
    /// The memory that the guest has listed or hinted, answered with [`Ranges`](crate::Ranges).
    Ranges {
        /// The id of the request.
        id: u64,
        /// The first address.
        from: u64,
    },
    /// Cancel a request, answered with [`Progress`](crate::Progress).
    Cancel {
        /// The id of the request.
        id: u64,
    },
    /// Metrics for a monitoring system, answered with [`Metrics`](crate::Metrics).
    Metrics {},
}

impl Request {
    /// Set the target, whatever it is now.
    pub const fn set(bytes: u64) -> Self {
        Self::Set {
            bytes,
            expected: None,
            lease: None,
            fallback: None,
            owner: None,
            release: None,
        }
    }
}

/// A command of free page hinting (specification, clause 5.5.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HintAction {
    /// Ask the guest for hints, under a new command id.
    Start,
    /// Stop hints. The guest keeps the hinted pages.
    Stop,
    /// Return the hinted pages to the guest.
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> Result<Request, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn requests_are_as_documented() {
        for (json, expected) in [
            (r#"{"command":"info"}"#, Request::Info {}),
            (
                r#"{"command":"subscribe"}"#,
                Request::Subscribe {
                    stats_milliseconds: None,
                },
            ),
            (
                r#"{"command":"subscribe","stats_milliseconds":250}"#,
                Request::Subscribe {
                    stats_milliseconds: Some(250),
                },
            ),
            (
                r#"{"command":"set","bytes":18446744073709551615}"#,
                Request::set(u64::MAX),
            ),
            (
                r#"{"command":"set","bytes":1,"expected":0,"lease":60000,"fallback":2,"owner":"manager","release":3}"#,
                Request::Set {
                    bytes: 1,
                    expected: Some(0),
                    lease: Some(60_000),
                    fallback: Some(2),
                    owner: Some("manager".to_owned()),
                    release: Some(3),
                },
            ),
            (
                r#"{"command":"stats","fresh":true}"#,
                Request::Stats { fresh: true },
            ),
            (
                r#"{"command":"set-stats-interval","seconds":10}"#,
                Request::SetStatsInterval { seconds: 10 },
            ),
            (
                r#"{"command":"hints","action":"done"}"#,
                Request::Hints {
                    action: HintAction::Done,
                },
            ),
            (
                r#"{"command":"inhibit","seconds":60}"#,
                Request::Inhibit {
                    seconds: 60,
                    owner: None,
                },
            ),
            (
                r#"{"command":"inhibit","seconds":60,"owner":"backup"}"#,
                Request::Inhibit {
                    seconds: 60,
                    owner: Some("backup".to_owned()),
                },
            ),
            (r#"{"command":"resume"}"#, Request::Resume { owner: None }),
            (
                r#"{"command":"resume","owner":"backup"}"#,
                Request::Resume {
                    owner: Some("backup".to_owned()),
                },
            ),
            (r#"{"command":"metrics"}"#, Request::Metrics {}),
        ] {
            assert_eq!(request(json).unwrap(), expected, "{json}");
            assert_eq!(serde_json::to_string(&expected).unwrap(), json);
        }
    }

    #[test]
    fn requests_with_something_wrong_are_refused() {
        for json in [
            "",
            "{}",
            r#"{"command":"shrink"}"#,
            r#"{"command":"info","verbose":true}"#,
            r#"{"command":"metrics","bytes":1}"#,
            r#"{"command":"set"}"#,
            r#"{"command":"set","bytes":-1}"#,
            r#"{"command":"set","bytes":18446744073709551616}"#,
            r#"{"command":"set","bytes":1,"wait":true}"#,
            r#"{"command":"set","bytes":1,"expected":"0"}"#,
            r#"{"command":"stats"}"#,
            r#"{"command":"hints","action":"pause"}"#,
            r#"{"command":"info"} {"command":"info"}"#,
        ] {
            assert!(request(json).is_err(), "{json} is taken for a request");
        }
    }
}
