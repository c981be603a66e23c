// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the requests of a client, and writes the responses.

use std::io::{self, BufRead, Write};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::changes::{Changes, Subscriber};
use crate::framing::{Line, read_line};
use crate::protocol::{ControlError, ErrorKind, Event, Reply, Request, Response};

/// The longest request in bytes. Valid requests have less than a hundred.
pub(super) const MAX_LINE: usize = 64 << 10;

/// A subscriber gets an event at least as often, so that it notices a daemon that hangs.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The least time between the events of a subscriber: a guest could cause any number of them.
const PAUSE: Duration = Duration::from_millis(20);

/// The handler of requests. It is called from one thread for each client.
pub trait Handler: Send + Sync {
    /// Executes a request.
    ///
    /// # Errors
    ///
    /// The error for the client.
    fn handle(&self, request: Request) -> Result<Response, ControlError>;

    /// What has changed, for subscribers.
    fn changes(&self) -> &Changes;

    /// Takes the shortest interval of statistics that a subscriber wants, or none if no subscriber wants one.
    fn sample_every(&self, _interval: Option<Duration>) {}
}

/// The interval of statistics of a subscriber.
struct Sampling<'a> {
    handler: &'a dyn Handler,
    interval: Duration,
}

impl<'a> Sampling<'a> {
    fn start(handler: &'a dyn Handler, interval: Duration) -> Self {
        let pass_on = |shortest| handler.sample_every(shortest);
        handler.changes().add(interval, pass_on);
        Self { handler, interval }
    }
}

impl Drop for Sampling<'_> {
    fn drop(&mut self) {
        let pass_on = |shortest| self.handler.sample_every(shortest);
        self.handler.changes().remove(self.interval, pass_on);
    }
}

/// Answers one client, line by line.
///
/// # Errors
///
/// The client disconnects before it has all answers.
pub fn serve(
    mut reader: impl BufRead,
    mut writer: impl Write,
    handler: &dyn Handler,
) -> io::Result<()> {
    while let Some(line) = read_line(&mut reader, MAX_LINE)? {
        let request = parse(line);
        let interval = match request {
            Ok(Request::Subscribe { stats_milliseconds }) => stats_milliseconds,
            _ => None,
        };
        let answer = match request.and_then(|request| handler.handle(request)) {
            Ok(response) => Reply::Ok(response),
            Err(error) => Reply::Error(error),
        };
        send(&mut writer, &answer)?;
        if matches!(answer, Reply::Ok(Response::Subscribed {})) {
            let interval = interval.map(Duration::from_millis);
            let _sampling = interval.map(|interval| Sampling::start(handler, interval));
            return Err(send_events(&mut writer, handler));
        }
    }
    Ok(())
}

/// Sends events until the client disconnects, or does not read.
fn send_events(writer: &mut impl Write, handler: &dyn Handler) -> io::Error {
    let mut subscriber = Subscriber::new(handler.changes());
    loop {
        let changed = subscriber.wait(HEARTBEAT);
        let alive = changed.is_empty().then_some(Event::Alive {});
        let events = changed
            .into_iter()
            .filter_map(|request| match handler.handle(request) {
                Ok(Response::Info(info)) => Some(Event::Info(info)),
                Ok(Response::Stats(stats)) => Some(Event::Stats(stats)),
                // There are no statistics.
                _ => None,
            });
        for event in events.chain(alive) {
            if let Err(error) = send(&mut *writer, &event) {
                return error;
            }
        }
        thread::sleep(PAUSE);
    }
}

fn parse(line: Line) -> Result<Request, ControlError> {
    let bad_request = |message| {
        ControlError::new(
            ErrorKind::BadRequest,
            message,
            "send one JSON object a line, such as {\"command\":\"info\"}",
        )
    };
    match line {
        Line::TooLong => Err(bad_request(format!(
            "the request is longer than {MAX_LINE} bytes"
        ))),
        Line::Whole(line) => serde_json::from_slice(&line)
            .map_err(|error| bad_request(format!("the request is malformed: {error}"))),
    }
}

/// Sends a line.
pub(super) fn send(mut writer: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line)
}
