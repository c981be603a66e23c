// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lines of a bounded length.

use std::io::{self, BufRead};

/// A received line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Its content, without its end.
    Whole(Vec<u8>),
    /// It was longer than allowed, and was skipped.
    TooLong,
}

/// Reads a line of at most `limit` bytes and its end. The rest of a stream without a line end is a line,
/// too. Returns `None` at the end of the stream.
///
/// # Errors
///
/// The errors of the reader.
pub(crate) fn read_line(reader: &mut impl BufRead, limit: usize) -> io::Result<Option<Line>> {
    let mut line = Vec::new();
    let mut too_long = false;
    loop {
        let available = match reader.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if available.is_empty() {
            return Ok((too_long || !line.is_empty()).then(|| finish(line, too_long)));
        }
        let (part, ended) = match available.iter().position(|&byte| byte == b'\n') {
            Some(end) => (&available[..end], true),
            None => (available, false),
        };
        too_long |= line.len() + part.len() > limit;
        if !too_long {
            line.extend_from_slice(part);
        }
        let consumed = part.len() + usize::from(ended);
        reader.consume(consumed);
        if ended {
            return Ok(Some(finish(line, too_long)));
        }
    }
}

fn finish(line: Vec<u8>, too_long: bool) -> Line {
    if too_long {
        Line::TooLong
    } else {
        Line::Whole(line)
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    const LIMIT: usize = 8;

    fn lines(input: &[u8], buffer: usize) -> Vec<Line> {
        let mut reader = BufReader::with_capacity(buffer, input);
        std::iter::from_fn(|| read_line(&mut reader, LIMIT).unwrap()).collect()
    }

    fn whole(content: &[u8]) -> Line {
        Line::Whole(content.to_vec())
    }

    #[test]
    fn lines_end_where_they_should() {
        assert_eq!(lines(b"", 4), []);
        assert_eq!(lines(b"\n", 4), [whole(b"")]);
        assert_eq!(
            lines(b"one\n\ntwo", 4),
            [whole(b"one"), whole(b""), whole(b"two")]
        );
    }

    #[test]
    fn the_limit_is_exact() {
        assert_eq!(
            lines(b"12345678\n123456789\n123456789", 4),
            [whole(b"12345678"), Line::TooLong, Line::TooLong]
        );
    }

    proptest! {
        #[test]
        fn the_reader_cuts_as_split_does(
            input in vec(proptest::prop_oneof![any::<u8>(), proptest::strategy::Just(b'\n')], 0..200),
            buffer in 1_usize..40,
        ) {
            let mut expected: Vec<_> = input
                .split(|&byte| byte == b'\n')
                .map(|line| if line.len() > LIMIT { Line::TooLong } else { whole(line) })
                .collect();
            if expected.last() == Some(&whole(b"")) {
                expected.pop();
            }
            prop_assert_eq!(lines(&input, buffer), expected);
        }
    }
}
