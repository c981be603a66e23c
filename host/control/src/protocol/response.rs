// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon answers.
//!
//! Answers may get more fields, and a client passes over those that it does not know.

use serde::{Deserialize, Serialize};

use super::error::ControlError;
use super::info::Info;
use super::progress::{Begun, Progress, Ranges};
use super::stats::Stats;

/// What the daemon answers when all is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// The answer to [`Request::Info`](crate::Request::Info).
    Info(Info),
    /// The answer to [`Request::Stats`](crate::Request::Stats).
    Stats(Stats),
    /// The answer to requests that the guest is asked.
    Begun(Begun),
    /// The answer to [`Request::Progress`](crate::Request::Progress) and [`Request::Cancel`](crate::Request::Cancel).
    Progress(Progress),
    /// The answer to [`Request::Ranges`](crate::Request::Ranges).
    Ranges(Ranges),
    /// The answer to [`Request::Metrics`](crate::Request::Metrics).
    Metrics(Metrics),
    /// It is done, and there is nothing to tell: an empty object.
    Done {},
}

/// The numbers for a monitoring system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// In Prometheus' text exposition format.
    pub text: String,
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
            sequence: 7,
            values: BTreeMap::from([(Stat::SwapIn, 0), (Stat::DirectReclaims, 4096)]),
        };
        assert_eq!(
            json(&Reply::Ok(Response::Stats(stats))),
            json!({"ok": {"age": 3, "sequence": 7, "values": {"swap-in": 0, "direct-reclaims": 4096}}})
        );
    }
}
