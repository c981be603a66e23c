// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Amounts of memory.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Mul, Sub};

/// An amount of memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// An amount in bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// An amount in KiB, as the kernel counts in /proc.
    pub const fn kib(kib: u64) -> Self {
        Self(kib << 10)
    }

    /// An amount in MiB.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// An amount in GiB.
    pub const fn gib(gib: u64) -> Self {
        Self(gib << 30)
    }

    /// An amount in pages of 4 KiB, the balloon's and, on most guests, the guest's.
    pub const fn pages(pages: u64) -> Self {
        Self(pages << 12)
    }

    /// In bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }

    /// In whole MiB.
    pub const fn as_mib(self) -> u64 {
        self.0 >> 20
    }

    /// In whole pages of 4 KiB.
    pub const fn as_pages(self) -> u64 {
        self.0 >> 12
    }

    /// The amount in `unit`s, rounded up.
    pub const fn div_ceil(self, unit: Self) -> u64 {
        self.0.div_ceil(unit.0)
    }

    /// The next amount in whole `unit`s.
    pub const fn next_multiple_of(self, unit: Self) -> Self {
        Self(self.0.next_multiple_of(unit.0))
    }

    /// The difference of two amounts.
    pub const fn abs_diff(self, other: Self) -> Self {
        Self(self.0.abs_diff(other.0))
    }

    /// The rest, or nothing when `other` is more.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Size {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub for Size {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Mul<u64> for Size {
    type Output = Self;

    fn mul(self, times: u64) -> Self {
        Self(self.0 * times)
    }
}

impl Sum for Size {
    fn sum<I: Iterator<Item = Self>>(sizes: I) -> Self {
        sizes.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            0..0x10_0000 => (1 << 10, "KiB"),
            0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
            _ => (1 << 30, "GiB"),
        };
        let (whole, hundredths) = (self.0 / unit, self.0 % unit * 100 / unit);
        if hundredths == 0 {
            write!(f, "{whole} {name}")
        } else {
            write!(f, "{whole}.{hundredths:02} {name}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_convert() {
        assert_eq!(Size::gib(1), Size::mib(1024));
        assert_eq!(Size::mib(1).as_pages(), 256);
        assert_eq!(Size::pages(3), Size::kib(12));
        assert_eq!(Size::bytes(4097).as_pages(), 1);
    }

    #[test]
    fn display_picks_the_unit() {
        assert_eq!(Size::kib(12).to_string(), "12 KiB");
        assert_eq!(Size::mib(1).to_string(), "1 MiB");
        assert_eq!(Size::mib(1536).to_string(), "1.50 GiB");
        assert_eq!(Size::gib(8).to_string(), "8 GiB");
    }

    #[test]
    fn units_of_any_size_are_counted() {
        let unit = Size::kib(64);
        assert_eq!(Size::kib(65).div_ceil(unit), 2);
        assert_eq!(Size::kib(65).next_multiple_of(unit), unit * 2);
        assert_eq!(unit.next_multiple_of(unit), unit);
    }

    #[test]
    fn differences_have_no_sign() {
        assert_eq!(Size::mib(1).abs_diff(Size::mib(3)), Size::mib(2));
        assert_eq!(Size::mib(1).saturating_sub(Size::mib(3)), Size::default());
    }
}
