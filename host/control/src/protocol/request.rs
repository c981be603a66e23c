// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a client wants.
//!
//! Requests are checked strictly, so that a misspelt field is not taken for one that was left out.

use serde::{Deserialize, Serialize};

/// What a client wants.
// The braces are for serde: it lets a unit variant have any fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of the balloon and of the guest, answered with [`Info`](crate::Info).
    Info {},
    /// Ask the guest for another size of the balloon, answered with [`Response::Done`](crate::Response::Done).
    Set {
        /// The new target in bytes.
        bytes: u64,
    },
    /// The guest's memory statistics, answered with [`Stats`](crate::Stats).
    Stats {
        /// Ask the guest for new ones and wait for them, instead of the last ones that it has sent.
        fresh: bool,
    },
    /// Set how often the guest is asked for statistics, answered with [`Response::Done`](crate::Response::Done).
    SetStatsInterval {
        /// The time between two samples in seconds. 0 stops asking.
        seconds: u32,
    },
    /// Give no memory back to the host for a while, whatever the guest says; answered with [`Response::Done`](crate::Response::Done).
    Inhibit {
        /// For how long, in seconds: 1 to 86400.
        seconds: u64,
        /// Who needs that, so that it can be ended apart from that of others: 1 to 64 bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
    },
    /// Give memory back to the host again, answered with [`Response::Done`](crate::Response::Done).
    Resume {
        /// End what this owner has asked for, and not what others have.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<String>,
    },
    /// Free page hinting, answered with [`Response::Done`](crate::Response::Done).
    Hints {
        /// What to do.
        action: HintAction,
    },
    /// Ask the guest which of its memory is unused, for a copy that leaves it out; answered with [`Begun`](crate::Begun).
    Unused {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address at which to stop, or 0 for the end of memory.
        end: u64,
    },
    /// Ask the guest for unused memory, and give it back to the host; answered with [`Begun`](crate::Begun).
    Reclaim {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address at which to stop, or 0 for the end of memory.
        end: u64,
    },
    /// Ask the guest to have less memory for caches, answered with [`Begun`](crate::Begun).
    DropCaches {
        /// The page cache.
        pages: bool,
        /// The slab caches of names and inodes.
        slab: bool,
    },
    /// How far the guest is with a request, answered with [`Progress`](crate::Progress).
    Progress {
        /// The id of the request.
        id: u64,
    },
    /// The unused memory that the guest has named, answered with [`Ranges`](crate::Ranges).
    Ranges {
        /// The id of the request.
        id: u64,
        /// The address from which on.
        from: u64,
    },
    /// Tell the guest that an answer is no longer wanted, answered with [`Progress`](crate::Progress).
    Cancel {
        /// The id of the request.
        id: u64,
    },
    /// The numbers for a monitoring system, answered with [`Metrics`](crate::Metrics).
    Metrics {},
}

/// What to do about free page hinting (specification, clause 5.5.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HintAction {
    /// Ask the guest for hints, under a new command id.
    Start,
    /// Want no more hints. The guest keeps the pages that it has hinted.
    Stop,
    /// Let the guest have the pages back that it has hinted.
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
                r#"{"command":"set","bytes":18446744073709551615}"#,
                Request::Set { bytes: u64::MAX },
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
            r#"{"command":"stats"}"#,
            r#"{"command":"hints","action":"pause"}"#,
            r#"{"command":"info"} {"command":"info"}"#,
        ] {
            assert!(request(json).is_err(), "{json} is taken for a request");
        }
    }
}
