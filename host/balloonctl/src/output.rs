// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The output on success.

use std::io::{self, Write};

use balloon_control::Answer;

use crate::failure::Failure;

/// Prints a response as raw JSON, or as text.
pub(crate) fn show(
    json: bool,
    answer: &Answer,
    human: impl FnOnce() -> Result<String, Failure>,
) -> Result<(), Failure> {
    if json {
        print(answer.json())
    } else {
        print(&human()?)
    }
}

/// Prints a text. Unlike `println!` it does not panic when the reader has closed the pipe.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    Ok(writeln!(io::stdout(), "{text}")?)
}
