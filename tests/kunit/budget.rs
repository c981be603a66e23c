// SPDX-License-Identifier: GPL-2.0

use crate::features::budget::Budget;

use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// A second in nanoseconds.
const SECOND: i64 = 1_000_000_000;

/// The kernel pages of a guest with 1 GiB.
const SMALL: usize = 1 << (30 - PAGE_SHIFT);

#[kunit_tests(virtio_balloon_rs_budget)]
mod tests {
    use super::*;

    #[test]
    fn unspent_time_is_available() {
        let mut budget = Budget::new(SMALL);

        assert_eq!(budget.pause(0), None);
        budget.spend(SECOND, SECOND);
        assert_eq!(budget.pause(SECOND), None);
    }

    #[test]
    fn a_request_about_a_large_memory_may_take_longer() {
        let mut budget = Budget::new(64 * SMALL);

        budget.spend(31 * SECOND, 0);
        assert_eq!(budget.pause(0), None);
        budget.spend(2 * SECOND, 0);
        assert_eq!(budget.pause(0), Some(10_001));
    }

    #[test]
    fn overspending_is_followed_by_a_pause_ten_times_as_long() {
        let mut budget = Budget::new(SMALL);

        budget.spend(4 * SECOND, 0);
        assert_eq!(budget.pause(0), Some(20_001));
        assert_eq!(budget.pause(10 * SECOND), Some(10_001));
        assert_eq!(budget.pause(20 * SECOND), None);
    }

    #[test]
    fn there_is_an_end_to_owing() {
        let mut budget = Budget::new(SMALL);

        budget.spend(1_000 * SECOND, 0);
        assert_eq!(budget.pause(0), Some(100_001));
    }

    #[test]
    fn there_is_an_end_to_saving() {
        let mut budget = Budget::new(SMALL);

        budget.spend(3 * SECOND, 1_000 * SECOND);
        assert!(budget.pause(1_000 * SECOND).is_some());
    }

    #[test]
    fn a_clock_that_goes_back_costs_nothing() {
        let mut budget = Budget::new(SMALL);

        budget.spend(SECOND, 10 * SECOND);
        assert_eq!(budget.pause(0), None);
        budget.spend(i64::MIN, i64::MAX);
        budget.spend(i64::MAX, i64::MIN);
        assert!(budget.pause(i64::MIN).is_some());
    }
}
