// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket: lines, and the requests in them. The first byte is the length of one read.

#![no_main]

use std::io::BufReader;

use balloon_control::{Changes, ControlError, Handler, Metrics, Request, Response, serve};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// The longest line that the server accepts, in bytes.
const MAX_LINE: usize = 64 << 10;

/// A byte that JSON does not contain stands for many spaces, so that the fuzzer easily finds lines that are
/// too long. An input has a few such bytes at most.
const WIDE: (u8, usize, usize) = (0xff, 16 << 10, 8);

/// Responds with the request that it received.
#[derive(Default)]
struct Echo {
    changes: Changes,
}

impl Handler for Echo {
    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        let text = format!("{request:?}");
        Ok(Response::Metrics(Metrics { text }))
    }
}

fn widen(data: &[u8]) -> Vec<u8> {
    let (wide, spaces, most) = WIDE;
    let mut parts = data.splitn(most + 1, |&byte| byte == wide);
    let mut bytes = parts.next().unwrap_or_default().to_vec();
    for part in parts {
        bytes.resize(bytes.len() + spaces, b' ');
        bytes.extend_from_slice(part);
    }
    bytes
}

/// The server's response to a line, or nothing if it must refuse the line.
fn expected(line: &[u8]) -> Option<Value> {
    let request: Request = serde_json::from_slice(line).ok()?;
    (line.len() <= MAX_LINE).then(|| json!({"ok": {"text": format!("{request:?}")}}))
}

fuzz_target!(|data: &[u8]| {
    let Some((&buffer, data)) = data.split_first() else {
        return;
    };
    let input = widen(data);
    let reader = BufReader::with_capacity(usize::from(buffer) + 1, &*input);
    let mut output = Vec::new();
    serve(reader, &mut output, &Echo::default()).expect("a client that stays");
    let output = String::from_utf8(output).expect("UTF-8");

    let mut lines: Vec<_> = input.split(|&byte| byte == b'\n').collect();
    if lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    assert_eq!(output.lines().count(), lines.len(), "one answer a line");
    for (line, answer) in lines.iter().zip(output.lines()) {
        let answer: Value = serde_json::from_str(answer).expect("an answer in JSON");
        match expected(line) {
            Some(expected) => assert_eq!(answer, expected),
            None => assert_eq!(answer["error"]["kind"], "bad-request"),
        }
    }
});
