// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that a guest keeps at least.

use std::str::FromStr;

use balloon_control::parse_size;
use balloon_wire::BALLOON_PAGE_SIZE;

/// The fixed part of the floor, in bytes.
const BASE: u64 = 64 << 20;

/// The part of a guest's memory in the floor: the kernel's own data grow with memory.
const PART: u64 = 16;

/// The memory that a guest keeps at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floor {
    /// In proportion to its memory.
    #[default]
    Auto,
    /// So many bytes. 0 leaves the limit to the guest's driver.
    Bytes(u64),
}

impl FromStr for Floor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => parse_size(text)
                .map(Self::Bytes)
                .map_err(|error| format!("{error}, or use auto")),
        }
    }
}

impl Floor {
    /// The floor in bytes of a guest with so many bytes of memory.
    pub fn of(self, memory: u64) -> u64 {
        match self {
            Self::Auto => (BASE + memory / PART).min(memory / 2),
            Self::Bytes(bytes) => bytes,
        }
    }

    /// The largest balloon that respects it, in bytes, if there is a limit.
    pub fn limit(self, memory: u64) -> Option<u64> {
        if self == Self::Bytes(0) {
            return None;
        }
        let rest = memory.saturating_sub(self.of(memory));
        Some(rest / BALLOON_PAGE_SIZE * BALLOON_PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_the_guest() {
        for (memory, floor) in [(64, 32), (128, 64), (1024, 128), (8192, 576)] {
            assert_eq!(Floor::Auto.of(memory << 20), floor << 20);
        }
    }

    #[test]
    fn sizes_are_taken() {
        assert_eq!("auto".parse(), Ok(Floor::Auto));
        assert_eq!("512MiB".parse(), Ok(Floor::Bytes(512 << 20)));
        assert_eq!("0".parse(), Ok(Floor::Bytes(0)));
        assert_eq!("512M".parse(), Ok(Floor::Bytes(512 << 20)));
        assert!("half".parse::<Floor>().is_err());
        assert!("512".parse::<Floor>().is_err());
    }

    #[test]
    fn a_limit_leaves_the_floor() {
        assert_eq!(Floor::Bytes(1 << 20).limit(5 << 20), Some(4 << 20));
        assert_eq!(Floor::Bytes(5 << 20).limit(4 << 20), Some(0));
        assert_eq!(Floor::Bytes(0).limit(4 << 20), None);
        assert_eq!(Floor::Bytes(1).limit(2 * 4096), Some(4096));
    }
}
