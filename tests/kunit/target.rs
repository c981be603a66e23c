// SPDX-License-Identifier: GPL-2.0

use crate::{
    balloon::policy::target::Step,
    device::settings::default_floor,
    messages::balloon_page::{
        balloon_pages,
        balloon_pfns,
        pages,
        BALLOON_PAGES_PER_PAGE, //
    },
    sources::nodes::part, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

#[kunit_tests(virtio_balloon_rs_target)]
mod tests {
    use super::*;

    #[test]
    fn a_target_of_nothing_is_reached_by_an_empty_balloon() {
        assert_eq!(pages(0), 0);
        assert_eq!(Step::towards(0, 0, 0), Step::Rest);
    }

    #[test]
    fn the_target_is_rounded_up_to_kernel_pages() {
        let per_page = BALLOON_PAGES_PER_PAGE as u32;

        assert_eq!(pages(1), 1);
        assert_eq!(pages(per_page), 1);
        assert_eq!(pages(per_page + 1), 2);
    }

    #[test]
    fn the_largest_target_does_not_overflow() {
        let all = pages(u32::MAX);

        assert!(all >= u32::MAX as usize / BALLOON_PAGES_PER_PAGE);
        assert_eq!(Step::towards(all, 0, 0), Step::Inflate(all));
    }

    #[test]
    fn the_size_stops_at_the_limit_of_the_field() {
        assert_eq!(balloon_pages(0), 0);
        assert_eq!(balloon_pages(3), 3 * BALLOON_PAGES_PER_PAGE as u32);
        assert_eq!(balloon_pages(usize::MAX), u32::MAX);
    }

    #[test]
    fn a_rounded_target_and_the_size_agree() {
        // Otherwise the balloon would grow and shrink forever.
        for target in [0, 1, 255, 256, 257, 1_835_008, 1_835_009] {
            let held = pages(target);

            assert_eq!(Step::towards(pages(target), held, 0), Step::Rest);
            assert!(balloon_pages(held) >= target);
        }
    }

    #[test]
    fn the_floor_grows_with_the_guest() {
        let mib = |mib: usize| mib << (20 - PAGE_SHIFT);

        for (present, left) in [
            (0, 8),
            (64, 40),
            (128, 72),
            (512, 168),
            (1_024, 232),
            (2_048, 360),
            (8_192, 744),
            (32_768, 1_512),
            (1 << 20, 488 + (1 << 15)),
        ] {
            assert_eq!(default_floor(mib(present)), mib(left));
        }
        assert!(default_floor(usize::MAX) < usize::MAX);
    }

    #[test]
    fn pages_on_their_way_count() {
        assert_eq!(Step::towards(100, 40, 60), Step::Rest);
        assert_eq!(Step::towards(100, 40, 50), Step::Inflate(10));
    }

    #[test]
    fn a_lower_target_takes_back_what_can_be_taken_back() {
        assert_eq!(Step::towards(100, 150, 0), Step::Deflate(50));
        // Half of the excess is still in flight.
        assert_eq!(Step::towards(100, 120, 30), Step::Deflate(50));
        assert_eq!(Step::towards(0, 20, 30), Step::Deflate(20));
        // All of it is in flight: it must arrive first.
        assert_eq!(Step::towards(10, 0, 30), Step::Rest);
    }

    #[test]
    fn counts_at_the_limit_do_not_overflow() {
        assert_eq!(
            Step::towards(0, usize::MAX, usize::MAX),
            Step::Deflate(usize::MAX)
        );
        assert_eq!(Step::towards(usize::MAX, usize::MAX, 1), Step::Rest);
    }

    #[test]
    fn a_kernel_page_has_consecutive_numbers() {
        let pfns = balloon_pfns(7);
        let first = 7 * BALLOON_PAGES_PER_PAGE as u32;

        assert_eq!(
            pfns,
            Ok(first..=first + (BALLOON_PAGES_PER_PAGE as u32 - 1))
        );
    }

    #[test]
    fn parts_are_about_in_proportion() {
        assert_eq!(part(100, 0, 0), 0);
        assert_eq!(part(100, 7, 7), 100);
        assert_eq!(part(4_096, 1, 2), 2_048);
        assert_eq!(part(100, 9, 7), 100);
        assert_eq!(part(1_000, 1, 3), 333);
        assert_eq!(part(usize::MAX >> 12, 1, 1), usize::MAX >> 12);
    }

    #[test]
    fn memory_beyond_16_tib_has_no_number() {
        let last = (1u64 << 32) / BALLOON_PAGES_PER_PAGE as u64 - 1;

        assert!(balloon_pfns(last).is_ok_and(|pfns| *pfns.end() == u32::MAX));
        assert!(balloon_pfns(last + 1).is_err());
        assert!(balloon_pfns(1 << 52).is_err());
        assert!(balloon_pfns(u64::MAX).is_err());
    }
}
