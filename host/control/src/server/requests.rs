// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the requests of a client, and writes the responses.

use std::io::{self, BufRead, Write};

use crate::framing::{Line, read_line};
use crate::protocol::{ControlError, ErrorKind, Reply, Request, Response};

/// The longest request in bytes. Valid requests have less than a hundred.
pub(super) const MAX_LINE: usize = 64 << 10;

/// The handler of requests. It is called from one thread for each client.
pub trait Handler: Send + Sync {
    /// Executes a request.
    ///
    /// # Errors
    ///
    /// The error for the client.
    fn handle(&self, request: Request) -> Result<Response, ControlError>;
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
        let answer = match parse(line).and_then(|request| handler.handle(request)) {
            Ok(response) => Reply::Ok(response),
            Err(error) => Reply::Error(error),
        };
        reply(&mut writer, &answer)?;
    }
    Ok(())
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

pub(super) fn reply(mut writer: impl Write, reply: &Reply<Response>) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line)
}
