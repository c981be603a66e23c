// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes on the command line.

use bytesize::ByteSize;

/// Reads a size in bytes, such as 2GiB or 512M. Only 0 may be without a unit.
///
/// # Errors
///
/// It is no size. The error says what to write.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    // Tools do not agree on the unit of a bare number: some use bytes, others KiB or MiB.
    if text != "0" && text.ends_with(|last: char| last.is_ascii_digit()) {
        return Err(format!("a unit is missing, as in {text}M or {text}B"));
    }
    // For the crate these letters are powers of ten. For memory they usually mean powers of 1024.
    let size = if text.ends_with(|last: char| "kKmMgGtTpPeE".contains(last)) {
        format!("{text}iB")
    } else {
        text.to_owned()
    };
    match size.parse() {
        Ok(ByteSize(bytes)) => Ok(bytes),
        Err(_) => Err("write it like 2GiB or 512M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    #[test]
    fn units_are_those_of_memory() {
        for (text, bytes) in [
            ("2GiB", 2 << 30),
            ("2 GiB", 2 << 30),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512Mi", 512 << 20),
            ("1.5G", 3 << 29),
            ("1t", 1 << 40),
            ("4096B", 4096),
            ("1GB", 1_000_000_000),
            ("0", 0),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_words_are_refused() {
        for text in [
            "", "M", "512", "-1M", "1 000M", "2XiB", "1.2.3G", "50%", "half",
        ] {
            assert!(parse_size(text).is_err(), "{text} is a size");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_typed_is_a_panic(text in "[0-9. -]{0,25}[kKmMgGtTpPeEiB%\\u{e9}]{0,4}") {
            let _ = parse_size(&text);
        }
    }
}
