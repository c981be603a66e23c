// SPDX-License-Identifier: GPL-2.0

use crate::rust::mm::memory;

use kernel::prelude::*;

#[kunit_tests(virtio_balloon_rs_memory)]
mod tests {
    use super::*;

    #[test]
    fn boosted_memory_is_not_available() {
        memory::boost(0);
        let before = memory::available_pages();

        memory::boost(8 << 20 >> kernel::page::PAGE_SHIFT);
        let (boosted, available) = (memory::boosted_pages(), memory::available_pages());
        memory::boost(0);
        assert!(boosted > 0);
        assert!(available < before);
    }

    #[test]
    fn movable_memory_counts_where_there_is_no_other() {
        const OTHER: bool = false;
        const MOVABLE: bool = true;
        let are_short = |zones: &[_]| memory::are_short(zones.iter().copied());

        assert!(!are_short(&[(MOVABLE, false)]));
        assert!(are_short(&[(MOVABLE, true)]));
        assert!(are_short(&[(OTHER, true), (MOVABLE, false)]));
        assert!(!are_short(&[(OTHER, true), (OTHER, false)]));
    }
}
