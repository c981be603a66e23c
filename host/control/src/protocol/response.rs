// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The responses of the daemon.
//!
//! Later versions may add fields. Clients ignore fields that they do not know.

use serde::{Deserialize, Serialize};

use super::error::ControlError;
use super::info::Info;
use super::progress::{Begun, Progress, Ranges};
use super::stats::Stats;

/// A response without an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// The answer to [`Request::Info`](crate::Request::Info).
    Info(Info),
    /// The answer to [`Request::Stats`](crate::Request::Stats).
    Stats(Stats),
    /// The answer to host requests.
    Begun(Begun),
    /// The answer to [`Request::Progress`](crate::Request::Progress) and [`Request::Cancel`](crate::Request::Cancel).
    Progress(Progress),
    /// The answer to [`Request::Ranges`](crate::Request::Ranges).
    Ranges(Ranges),
    /// The answer to [`Request::Metrics`](crate::Request::Metrics).
    Metrics(Metrics),
    /// The answer to [`Request::Subscribe`](crate::Request::Subscribe): an empty object. Events follow.
    Subscribed {},
    /// Success without a result: an empty object.
    Done {},
}

/// Metrics for a monitoring system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// In Prometheus' text exposition format.
    pub text: String,
}

/// The response to a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply<T> {
    Ok(T),
    Error(ControlError),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::protocol::{ErrorKind, Stat};

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
            requested: 3021,
            sequence: 7,
            values: BTreeMap::from([(Stat::SwapIn, 0), (Stat::DirectReclaims, 4096)]),
        };
        assert_eq!(
            json(&Reply::Ok(Response::Stats(stats))),
            json!({"ok": {"age": 3, "requested": 3021, "sequence": 7, "values": {"swap-in": 0, "direct-reclaims": 4096}}})
        );
    }
}
