// SPDX-License-Identifier: GPL-2.0

use crate::balloon::policy::liveness::Liveness;

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_liveness)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_for_used_buffers_counts_for_a_while() {
        let mut liveness = Liveness::new();

        assert!(liveness.note(1_000, true, true));
        assert!(liveness.note(1_099, false, false));
        assert!(!liveness.note(1_100, false, false));
    }

    #[test]
    fn used_buffers_that_were_not_there_just_now_need_no_interrupt() {
        let mut liveness = Liveness::new();

        assert!(!liveness.note(1_000, false, false));
        assert!(liveness.note(1_050, true, false));
    }

    #[test]
    fn used_buffers_may_be_found_before_it_is_known_that_they_are_new() {
        let mut liveness = Liveness::new();

        assert!(!liveness.note(1_000, true, false));
        assert!(liveness.note(1_050, false, true));
        assert!(!liveness.note(1_200, false, true));
    }

    #[test]
    fn used_buffers_may_be_older_than_the_end_of_the_device() {
        let mut liveness = Liveness::new();

        assert!(!liveness.note(0, true, false));
        assert!(!liveness.note(1_000, true, false));
    }

    #[test]
    fn used_buffers_that_were_not_there_during_a_long_run_need_no_interrupt() {
        let mut liveness = Liveness::new();

        assert!(!liveness.note(0, false, false));
        // Found after a long wait: the device may have ended since it used them.
        assert!(!liveness.note(950, true, false));
        assert!(liveness.note(1_000, true, false));
    }

    #[test]
    fn an_interrupt_without_used_buffers_is_no_response() {
        let mut liveness = Liveness::new();

        assert!(!liveness.note(1_000, false, true));
        assert!(!liveness.note(1_010, false, true));
    }
}
