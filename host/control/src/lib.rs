// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control protocol of the balloon device: the messages, and both sides of the socket. It also has the parser of
//! sizes and the writer of metrics that the programs use.
//!
//! Each request and each response is a JSON object on a line of its own. docs/control.md describes the
//! protocol for programs that do not use this library.

mod client;
mod exposition;
mod framing;
mod protocol;
mod server;
mod size;
mod socket;

pub use client::{Answer, Client, ClientError, Events, News};
pub use exposition::Exposition;
pub use protocol::{
    Begun, ByQueue, ControlError, Counters, ErrorKind, Event, Guest, HintAction, Info, Lease,
    Metrics, Progress, Ranges, Received, Request, RequestStatus, Response, Shortfall, Stat, Stats,
    Unit,
};
pub use server::{Changes, Handler, Server, serve};
pub use size::parse_size;
pub use socket::{Access, BindError, SocketFile, listen};
