// SPDX-License-Identifier: GPL-2.0

use super::device::eventually;
use crate::rust::memory;

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_memory)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_back_is_settled() -> Result {
        // More than once, as the balloon does: kswapd is not woken while it is about to sleep.
        let settled = || {
            eventually(|| {
                memory::settle_boosts();
                Ok(memory::boosted_pages() == 0)
            })
        };
        settled()?;
        let before = memory::available_pages();
        memory::boost(8 << 20 >> kernel::page::PAGE_SHIFT);
        assert!(memory::boosted_pages() > 0);
        assert!(memory::available_pages() < before);

        settled()
    }
}
