// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is said on the socket.
//!
//! Requests are checked strictly, so that a misspelt field is not taken for one that was left out. What
//! the daemon tells may get more fields, and a client passes over those that it does not know.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a client wants.
// The braces are for serde: it lets a unit variant have any fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of the balloon and of the guest, answered with [`Info`].
    Info {},
    /// Ask the guest for another size of the balloon, answered with [`Response::Done`].
    Set {
        /// The new target in bytes.
        bytes: u64,
    },
    /// The guest's memory statistics, answered with [`Stats`].
    Stats {
        /// Ask the guest for new ones and wait for them, instead of the last ones that it has sent.
        fresh: bool,
    },
    /// Set how often the guest is asked for statistics, answered with [`Response::Done`].
    SetStatsInterval {
        /// The time between two samples in seconds. 0 stops asking.
        seconds: u32,
    },
    /// Give no memory back to the host for a while, whatever the guest says; answered with [`Response::Done`].
    Inhibit {
        /// For how long, in seconds: 1 to 86400.
        seconds: u64,
    },
    /// Give memory back to the host again, answered with [`Response::Done`].
    Resume {},
    /// Free page hinting, answered with [`Response::Done`].
    Hints {
        /// What to do.
        action: HintAction,
    },
    /// Ask the guest which of its memory is unused, for a copy that leaves it out; answered with [`Begun`].
    Unused {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address after the last one, or 0 for the end of memory.
        end: u64,
    },
    /// Ask the guest for unused memory, and give it back to the host; answered with [`Begun`].
    Reclaim {
        /// The smallest block that is worth an answer, in bytes: a power of two, 4096 or more.
        block: u64,
        /// The first address that is asked for.
        start: u64,
        /// The address after the last one, or 0 for the end of memory.
        end: u64,
    },
    /// Ask the guest to have less memory for caches, answered with [`Begun`].
    DropCaches {
        /// The page cache.
        pages: bool,
        /// The slab caches of names and inodes.
        slab: bool,
    },
    /// How far the guest is with a request, answered with [`Progress`].
    Progress {
        /// The id of the request.
        id: u64,
    },
    /// The unused memory that the guest has named, answered with [`Ranges`].
    Ranges {
        /// The id of the request.
        id: u64,
        /// The address from which on.
        from: u64,
    },
    /// Tell the guest that an answer is no longer wanted, answered with [`Progress`].
    Cancel {
        /// The id of the request.
        id: u64,
    },
    /// The numbers for a monitoring system, answered with [`Metrics`].
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

/// What the daemon answers when all is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// The answer to [`Request::Info`].
    Info(Info),
    /// The answer to [`Request::Stats`].
    Stats(Stats),
    /// The answer to requests that the guest is asked.
    Begun(Begun),
    /// The answer to [`Request::Progress`] and [`Request::Cancel`].
    Progress(Progress),
    /// The answer to [`Request::Ranges`].
    Ranges(Ranges),
    /// The answer to [`Request::Metrics`].
    Metrics(Metrics),
    /// It is done, and there is nothing to tell: an empty object.
    Done {},
}

/// The state of the balloon and of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// How much the guest is asked to give away, in bytes.
    pub target: u64,
    /// How much the guest has given away, in bytes, as it says itself.
    pub size: u64,
    /// How much memory the guest has, in bytes, in the balloon or not. It is what the guest says in its statistics,
    /// or what the VMM has shared as long as there are none.
    pub memory: Option<u64>,
    /// How much memory the VMM has shared, in bytes. It has memory that the guest has not, such as what a
    /// virtio-mem device has not plugged.
    #[serde(default)]
    pub shared: Option<u64>,
    /// The largest balloon that the daemon asks for, in bytes: it leaves the guest a floor.
    #[serde(default)]
    pub limit: Option<u64>,
    /// For how long a guest that boots is still left alone, in seconds.
    #[serde(default)]
    pub grace: Option<u64>,
    /// The smallest piece of memory that the host gets back, in bytes.
    pub granule: u64,
    /// Why memory is not given back to the host, by the name of the reason. More may come in later versions.
    #[serde(default)]
    pub withheld: Vec<String>,
    /// For how long a client still has no memory given back to the host, in seconds.
    #[serde(default)]
    pub inhibited: Option<u64>,
    /// How often the guest is asked for statistics, in seconds. 0 is never.
    pub stats_interval: u32,
    /// For how long the daemon has been running, in seconds.
    pub uptime: u64,
    /// The other side.
    pub guest: Guest,
    /// What has been counted since the daemon was started.
    pub counters: Counters,
}

/// The size of the largest page that a guest's kernel has, in bytes. A driver rounds a target up to its pages.
const LARGEST_PAGE: u64 = 64 << 10;

impl Info {
    /// How much the guest is asked for now, in bytes, without regard to a boot.
    pub fn asked(&self) -> u64 {
        self.target.min(self.limit.unwrap_or(u64::MAX))
    }

    /// Whether the guest has given away what it is asked for, rounded up to a page of its own.
    pub fn is_reached(&self) -> bool {
        let asked = self.asked();
        (asked..asked.saturating_add(LARGEST_PAGE)).contains(&self.size)
    }
}

/// What is known about the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// A VMM is connected.
    pub connected: bool,
    /// A driver in the guest has negotiated features, and its queues are ready.
    pub driver: bool,
    /// The names of the features that were negotiated.
    pub features: Vec<String>,
    /// How long ago the guest did something for the last time, in seconds.
    pub answered: Option<u64>,
    /// Why the guest stays below the target, when it tells.
    pub short_of_target: Option<Shortfall>,
    /// How many requests the guest is to answer.
    pub open_requests: u64,
}

/// Why a guest stops inflating before it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shortfall {
    /// It would have less memory than the driver wants to leave it.
    Floor,
    /// It finds no memory that it could give away.
    NoMemory,
    /// It ran out of memory, and leaves the balloon alone for a while.
    AfterOom,
    /// Its administrator keeps it out of ballooning.
    Excluded,
}

impl Shortfall {
    /// Its name on the socket.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::NoMemory => "no-memory",
            Self::AfterOom => "after-oom",
            Self::Excluded => "excluded",
        }
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Floor => "the guest's floor is reached",
            Self::NoMemory => "the guest has no free memory",
            Self::AfterOom => "the guest ran out of memory and pauses",
            Self::Excluded => "the guest is kept out of ballooning",
        })
    }
}

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
    /// How many messages named pages, by how they did.
    pub encodings: Encodings,
    /// How many messages were refused, by the reason.
    pub refused: BTreeMap<String, u64>,
}

/// How many there were, by the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// How many messages named pages, by how they did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encodings {
    /// Arrays of page frame numbers.
    pub pfns: u64,
    /// Page sets of ranges.
    pub ranges: u64,
    /// Page sets that are bitmaps.
    pub bitmaps: u64,
}

/// A sample of the guest's memory statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// How old the sample is, in seconds.
    pub age: u64,
    /// The number of the sample. Each one has a higher number than the one before it.
    pub sequence: u64,
    /// The statistics that the guest has sent.
    pub values: BTreeMap<Stat, u64>,
}

/// A statistic (specification, clause 5.5.6.4, and linux/virtio_balloon.h for those that are newer), in the
/// order of the tags and with the names that the header gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stat {
    /// What was read from swap, in bytes.
    SwapIn,
    /// What was written to swap, in bytes.
    SwapOut,
    /// How many page faults had to wait for a device.
    MajorFaults,
    /// How many page faults there were that had not to wait.
    MinorFaults,
    /// What is not in use for anything, in bytes.
    FreeMemory,
    /// What there is, in bytes.
    TotalMemory,
    /// What programs can have without swapping, in bytes.
    AvailableMemory,
    /// What is in use for caches of files, in bytes.
    DiskCaches,
    /// How many huge pages were allocated.
    HugetlbAllocations,
    /// How many allocations of huge pages failed.
    HugetlbFailures,
    /// How many times a program was killed for its memory.
    OomKills,
    /// How many allocations had to wait for memory to be reclaimed.
    AllocStalls,
    /// What was looked at in the background to reclaim it, in bytes.
    AsyncScans,
    /// What was looked at by those who need memory, in bytes.
    DirectScans,
    /// What was reclaimed in the background, in bytes.
    AsyncReclaims,
    /// What was reclaimed by those who need memory, in bytes.
    DirectReclaims,
}

/// What a statistic is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// In bytes.
    Bytes,
    /// How many times something happened.
    Times,
}

impl Stat {
    /// All of them. Each one is at the place of its tag.
    pub const ALL: [Self; 16] = [
        Self::SwapIn,
        Self::SwapOut,
        Self::MajorFaults,
        Self::MinorFaults,
        Self::FreeMemory,
        Self::TotalMemory,
        Self::AvailableMemory,
        Self::DiskCaches,
        Self::HugetlbAllocations,
        Self::HugetlbFailures,
        Self::OomKills,
        Self::AllocStalls,
        Self::AsyncScans,
        Self::DirectScans,
        Self::AsyncReclaims,
        Self::DirectReclaims,
    ];

    /// The statistic of a tag on the wire, if there is one.
    pub fn from_tag(tag: u16) -> Option<Self> {
        Self::ALL.get(usize::from(tag)).copied()
    }

    /// Whether it only grows, until the guest starts again.
    pub const fn is_counter(self) -> bool {
        !matches!(
            self,
            Self::FreeMemory | Self::TotalMemory | Self::AvailableMemory | Self::DiskCaches
        )
    }

    /// What it is counted in.
    pub const fn unit(self) -> Unit {
        match self {
            Self::SwapIn
            | Self::SwapOut
            | Self::FreeMemory
            | Self::TotalMemory
            | Self::AvailableMemory
            | Self::DiskCaches
            | Self::AsyncScans
            | Self::DirectScans
            | Self::AsyncReclaims
            | Self::DirectReclaims => Unit::Bytes,
            Self::MajorFaults
            | Self::MinorFaults
            | Self::HugetlbAllocations
            | Self::HugetlbFailures
            | Self::OomKills
            | Self::AllocStalls => Unit::Times,
        }
    }
}

impl fmt::Display for Stat {
    /// Writes its name on the socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// The driver has stopped because nobody wants the answer any more. What it has named until then holds.
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
    pub const ALL: [Self; 9] = [
        Self::Waiting,
        Self::Open,
        Self::Complete,
        Self::Aborted,
        Self::Cancelled,
        Self::Unsupported,
        Self::Malformed,
        Self::UnknownId,
        Self::Reset,
    ];

    /// Whether nothing more will become of it.
    pub const fn is_end(self) -> bool {
        !matches!(self, Self::Waiting | Self::Open)
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

/// The numbers for a monitoring system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// In Prometheus' text exposition format.
    pub text: String,
}

/// Why the daemon does not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub kind: ErrorKind,
    /// What is wrong, for people.
    pub message: String,
    /// What they can do about it.
    pub advice: String,
}

impl ControlError {
    /// An error of a kind, with what is wrong and what to do about it.
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

/// What comes back for a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply<T> {
    Ok(T),
    Error(ControlError),
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

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
                Request::Inhibit { seconds: 60 },
            ),
            (r#"{"command":"resume"}"#, Request::Resume {}),
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

    #[test]
    fn responses_are_as_documented() {
        let json = |reply: &Reply<Response>| serde_json::to_value(reply).unwrap();
        assert_eq!(json(&Reply::Ok(Response::Done {})), json!({"ok": {}}));
        assert_eq!(
            json(&Reply::Error(ControlError::new(
                ErrorKind::NoGuest,
                "what",
                "advice"
            ))),
            json!({"error": {"kind": "no-guest", "message": "what", "advice": "advice"}})
        );
        let stats = Stats {
            age: 3,
            sequence: 7,
            values: BTreeMap::from([(Stat::SwapIn, 0), (Stat::DirectReclaims, 4096)]),
        };
        assert_eq!(
            json(&Reply::Ok(Response::Stats(stats))),
            json!({"ok": {"age": 3, "sequence": 7, "values": {"swap-in": 0, "direct-reclaims": 4096}}})
        );
    }

    #[test]
    fn a_client_passes_over_what_is_new() {
        let guest = json!({
            "connected": true, "driver": true, "features": [], "answered": null,
            "short_of_target": "after-oom", "open_requests": 0, "mood": "good"
        });
        let guest: Guest = serde_json::from_value(guest).unwrap();
        assert_eq!(guest.short_of_target, Some(Shortfall::AfterOom));
    }

    #[test]
    fn a_target_is_reached_in_pages_of_the_guest() {
        let info = |target, size, limit| Info {
            target,
            size,
            limit,
            ..Info::default()
        };
        assert!(info(1_000_001_536, 1_000_013_824, None).is_reached());
        assert!(info(0, 0, None).is_reached());
        assert!(!info(1 << 30, (1 << 30) - 4096, None).is_reached());
        assert!(!info(1 << 30, (1 << 30) + 65536, None).is_reached());
        assert!(info(2 << 30, 1 << 30, Some(1 << 30)).is_reached());
    }

    #[test]
    fn statistics_have_their_tags_and_names() {
        for (tag, name) in [
            (0, "swap-in"),
            (5, "total-memory"),
            (9, "hugetlb-failures"),
            (10, "oom-kills"),
            (15, "direct-reclaims"),
        ] {
            let stat = Stat::from_tag(tag).unwrap();
            assert_eq!(stat.to_string(), name);
            assert_eq!(serde_json::to_value(stat).unwrap(), Value::from(name));
        }
        assert_eq!(Stat::from_tag(16), None);
        assert!(Stat::ALL.is_sorted());
    }

    #[test]
    fn statuses_have_their_places_and_names() {
        for (place, status) in RequestStatus::ALL.into_iter().enumerate() {
            assert_eq!(status as usize, place, "{status}");
        }
        assert_eq!(RequestStatus::UnknownId.to_string(), "unknown-id");
        assert!(RequestStatus::Reset.is_end() && !RequestStatus::Open.is_end());
    }
}
