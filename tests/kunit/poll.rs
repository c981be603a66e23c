// SPDX-License-Identifier: GPL-2.0

use crate::rust::work::poll::StallTimeout;

use kernel::{
    prelude::*,
    time::Delta, //
};

/// Polls until the `n`th time. Returns the result, and how many times that was.
fn poll_until(timeout: &StallTimeout, n: usize) -> (Option<()>, usize) {
    let mut polls = 0;
    let result = timeout.poll(|| {
        polls += 1;
        (polls == n).then_some(())
    });

    (result, polls)
}

#[kunit_tests(virtio_balloon_rs_poll)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_polled_until_it_holds() {
        let timeout = StallTimeout::new(Delta::from_secs(60));

        assert_eq!(poll_until(&timeout, 3), (Some(()), 3));
        assert_eq!(poll_until(&timeout, 3), (Some(()), 3));
    }

    #[test]
    fn a_device_that_has_stalled_is_not_waited_for_again() {
        let timeout = StallTimeout::new(Delta::from_millis(10));

        assert!(poll_until(&timeout, usize::MAX).0.is_none());
        assert_eq!(poll_until(&timeout, usize::MAX), (None, 1));
        assert_eq!(poll_until(&timeout, 1), (Some(()), 1));
    }

    #[test]
    fn a_device_that_makes_progress_is_waited_for_again() {
        // So long that it does not expire between two polls.
        let timeout = StallTimeout::new(Delta::from_millis(500));

        assert!(poll_until(&timeout, usize::MAX).0.is_none());
        timeout.progress();
        assert_eq!(poll_until(&timeout, 2), (Some(()), 2));
    }
}
