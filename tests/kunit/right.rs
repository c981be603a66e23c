// SPDX-License-Identifier: GPL-2.0

use crate::rust::right::Right;

use kernel::prelude::*;

static RIGHT: Right = Right::new();

#[kunit_tests(virtio_balloon_rs_right)]
mod tests {
    use super::*;

    #[test]
    fn a_right_has_one_owner() {
        let owner = RIGHT.take();
        assert!(owner.is_some());
        // An attempt that fails does not release it.
        assert!(RIGHT.take().is_none());
        assert!(RIGHT.take().is_none());

        drop(owner);
        assert!(RIGHT.take().is_some());
    }
}
