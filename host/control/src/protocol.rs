// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages of the socket.

mod counters;
mod error;
mod event;
mod info;
mod progress;
mod request;
mod response;
mod stats;

pub use counters::{ByQueue, Counters, Received};
pub use error::{ControlError, ErrorKind};
pub use event::Event;
pub use info::{Guest, Info, Lease, Shortfall};
pub use progress::{Begun, Progress, Ranges, RequestStatus};
pub use request::{HintAction, Request};
pub(crate) use response::Reply;
pub use response::{Metrics, Response};
pub use stats::{Stat, Stats, Unit};
