// SPDX-License-Identifier: GPL-2.0

//! A test in which an assertion fails leaves no device to the next tests.

use super::device::BASE;

use crate::rust::virtio::fake_device::{
    registered,
    FakeDevice, //
};

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_cleanup)]
mod tests {
    use super::*;

    #[test]
    fn no_destructor_runs_when_an_assertion_fails() -> Result {
        // As if one failed here.
        core::mem::forget(FakeDevice::new(&BASE)?);
        assert_eq!(registered(), 1);
        Ok(())
    }

    #[test]
    fn the_next_test_finds_no_device() {
        assert_eq!(registered(), 0);
    }
}
