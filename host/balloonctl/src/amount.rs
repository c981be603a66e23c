// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Amounts of memory on the command line.

use std::str::FromStr;

use balloon_control::parse_size;

use crate::failure::Failure;

/// A balloon's page in bytes, whatever the guest's are (specification, clause 5.5.6).
pub(crate) const PAGE: u64 = 4096;

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Amount {
    /// In bytes.
    Bytes(u64),
    /// In hundredths of the guest's memory, 100 at most.
    Percent(u64),
}

impl Amount {
    /// Whether it depends on how much memory the guest has.
    pub(crate) fn is_relative(self) -> bool {
        matches!(self, Self::Percent(_))
    }

    /// In bytes, for a guest with that much memory. A percentage is rounded down to whole pages.
    ///
    /// # Errors
    ///
    /// It is a percentage, and the guest's memory is not known.
    pub(crate) fn of(self, memory: Option<u64>) -> Result<u64, Failure> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Percent(percent) => {
                let memory = memory.ok_or(Failure::MemoryUnknown)?;
                let bytes = memory / 100 * percent + memory % 100 * percent / 100;
                Ok(bytes / PAGE * PAGE)
            }
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if let Some(percent) = text.strip_suffix('%') {
            return match percent.trim_end().parse() {
                Ok(percent @ 0..=100) => Ok(Self::Percent(percent)),
                _ => Err("a percentage is a whole number from 0 to 100".to_owned()),
            };
        }
        parse_size(text)
            .map(Self::Bytes)
            .map_err(|error| format!("{error}, or like 50%"))
    }
}

/// An address in bytes: a hexadecimal number, or a size from 0 on.
///
/// # Errors
///
/// It is neither.
pub(crate) fn address(text: &str) -> Result<u64, String> {
    let hexadecimal = text
        .strip_prefix("0x")
        .map(|digits| u64::from_str_radix(digits, 16));
    match (hexadecimal, text.parse()) {
        (Some(Ok(address)), _) | (None, Ok(Amount::Bytes(address))) => Ok(address),
        _ => Err("write it like 0x100000 or 4GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    fn bytes(text: &str) -> u64 {
        match text.parse() {
            Ok(Amount::Bytes(bytes)) => bytes,
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn units_are_those_of_memory() {
        assert_eq!(bytes("2GiB"), 2 << 30);
        assert_eq!(bytes("2 GiB"), 2 << 30);
        assert_eq!(bytes("512M"), 512 << 20);
        assert_eq!(bytes("512m"), 512 << 20);
        assert_eq!(bytes("512Mi"), 512 << 20);
        assert_eq!(bytes("1.5G"), 3 << 29);
        assert_eq!(bytes("1t"), 1 << 40);
        assert_eq!(bytes("4096B"), 4096);
        assert_eq!(bytes("1GB"), 1_000_000_000);
        assert_eq!(bytes("0"), 0);
    }

    #[test]
    fn other_words_are_refused() {
        for text in [
            "", "M", "512", "-1M", "1 000M", "2XiB", "1.2.3G", "%", "101%", "-1%", "1.5%", "half",
        ] {
            assert!(text.parse::<Amount>().is_err(), "{text} is an amount");
        }
    }

    #[test]
    fn addresses_are_sizes_or_hexadecimal() {
        assert_eq!(address("0x100000"), Ok(1 << 20));
        assert_eq!(address("4GiB"), Ok(4 << 30));
        assert_eq!(address("0"), Ok(0));
        for text in [
            "",
            "0x",
            "0xg",
            "0x10000000000000000",
            "50%",
            "1048576",
            "-1B",
        ] {
            assert!(address(text).is_err(), "{text} is an address");
        }
    }

    #[test]
    fn percentages_are_of_the_guest() {
        let half: Amount = "50%".parse().unwrap();
        assert_eq!(half.of(Some(8 << 30)).unwrap(), 4 << 30);
        assert!(matches!(half.of(None), Err(Failure::MemoryUnknown)));
        assert_eq!(Amount::Bytes(5).of(None).unwrap(), 5);
    }

    proptest! {
        #[test]
        fn a_percentage_is_a_part_in_whole_pages(memory: u64, percent in 0_u64..=100) {
            let exact = u128::from(memory) * u128::from(percent) / 100;
            let bytes = Amount::Percent(percent).of(Some(memory)).unwrap();
            prop_assert_eq!(bytes % PAGE, 0);
            prop_assert_eq!(u128::from(bytes), exact / u128::from(PAGE) * u128::from(PAGE));
        }

        #[test]
        fn nothing_that_is_typed_is_a_panic(text in "[0-9. -]{0,25}[kKmMgGtTpPeEiB%\\u{e9}]{0,4}") {
            let _ = text.parse::<Amount>();
        }
    }
}
