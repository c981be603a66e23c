// SPDX-License-Identifier: GPL-2.0

use crate::balloon::{
    policy::{
        backoff::{
            Backoff,
            Cause::{
                NoMemory,
                OutOfMemory, //
            }, //
        },
        growth::Growth,
        stop_reason::StopReason, //
    }, //
};

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_backoff)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_pause_before_a_failure() {
        assert_eq!(Backoff::new().remaining(0), None);
    }

    #[test]
    fn only_the_first_failure_counts_as_first() {
        let mut backoff = Backoff::new();

        assert!(backoff.fail(NoMemory, 0));
        assert!(!backoff.fail(NoMemory, 1_000));
    }

    #[test]
    fn pauses_double_up_to_half_a_minute() {
        let mut backoff = Backoff::new();

        let mut now = 0;

        for expected in [
            200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000,
        ] {
            backoff.fail(NoMemory, now);
            assert_eq!(backoff.remaining(now), Some(expected));
            now += i64::from(expected);
        }
    }

    #[test]
    fn a_failure_in_a_pause_restarts_it() {
        let mut backoff = Backoff::new();

        backoff.fail(NoMemory, 0);
        backoff.fail(NoMemory, 150);
        assert_eq!(backoff.remaining(150), Some(200));
    }

    #[test]
    fn running_out_of_memory_makes_for_long_pauses() {
        let mut backoff = Backoff::new();

        backoff.fail(NoMemory, 0);
        assert!(!backoff.fail(OutOfMemory, 100));
        assert_eq!(backoff.remaining(100), Some(10_000));

        // Many of them in a row count as one failure.
        for now in 101..200 {
            backoff.fail(OutOfMemory, now);
        }
        assert_eq!(backoff.remaining(199), Some(10_000));

        // The next one comes after the pause.
        backoff.fail(OutOfMemory, 10_199);
        assert_eq!(backoff.remaining(10_199), Some(20_000));
    }

    #[test]
    fn a_pause_ends() {
        let mut backoff = Backoff::new();

        backoff.fail(NoMemory, 1_000);
        assert_eq!(backoff.remaining(1_199), Some(1));
        assert_eq!(backoff.remaining(1_200), None);
        assert_eq!(backoff.remaining(i64::MAX), None);
    }

    #[test]
    fn a_reset_forgets_all() {
        let mut backoff = Backoff::new();

        backoff.fail(NoMemory, 0);
        backoff.fail(NoMemory, 0);
        backoff.reset();
        assert_eq!(backoff.remaining(0), None);
        assert!(backoff.fail(NoMemory, 0));
        assert_eq!(backoff.remaining(0), Some(200));
    }

    #[test]
    fn a_strange_clock_does_no_harm() {
        let mut backoff = Backoff::new();

        backoff.fail(NoMemory, i64::MAX);
        assert_eq!(backoff.remaining(i64::MIN), None);
        backoff.reset();
        backoff.fail(NoMemory, 5_000);
        assert_eq!(backoff.remaining(0), Some(200));
    }

    #[test]
    fn memory_that_comes_ends_a_pause() {
        let mut growth = Growth::new();
        let is_over = |growth: &Growth, ready, spare| growth.pause(0, ready, || spare).is_none();

        assert!(growth.fail(StopReason::Floor, 5, 0));
        assert!(!is_over(&growth, 0, 5));
        assert!(is_over(&growth, 0, usize::MAX));
        // However little memory is left to the guest.
        assert!(is_over(&growth, 1, 0));
        growth.fail_after_oom(0);
        assert!(!is_over(&growth, 1, usize::MAX));
    }
}
