// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::budget::Budget;
use crate::counters::Counters;
use crate::memory::discard::Discarder;
use crate::testing::{HOLE, MemoryFiles, PAGE, left_when_killed, memory_file};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use proptest::prelude::*;
use std::os::unix::fs::MetadataExt;

/// Two regions of a file with a hole between them in the guest's address space.
fn balloon(files: &MemoryFiles, granule: u64) -> Balloon {
    let mut balloon = Balloon::default();
    balloon.set_memory(&files.memory(), Granularity::Bytes(granule));
    balloon
}

fn discard(pieces: &mut Pieces) {
    let counters = Counters::default();
    assert!(Discarder::default().discard(pieces, &counters, &mut 0, Budget::UNLIMITED));
    assert_eq!(counters.discard_failures.get(), 0);
}

/// A range for each page.
fn pages(pages: &[u64]) -> Vec<Range<u64>> {
    pages.iter().map(|&page| page..page + 1).collect()
}

#[test]
fn only_new_pages_are_punched() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, PAGE);
    let mut pieces = Pieces::default();
    let tally = balloon.inflate(&pages(&[3, 4, 4, 255, HOLE / PAGE - 1]), &mut pieces);
    assert_eq!(
        tally,
        Tally {
            moved: 3,
            repeated: 1,
            outside: 1
        }
    );
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::from([3, 4, 255]));

    files.fill();
    let tally = balloon.inflate(&pages(&[3, 4]), &mut pieces);
    assert_eq!(
        tally,
        Tally {
            repeated: 2,
            ..Tally::default()
        }
    );
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::new());

    let mut held = Pieces::default();
    balloon.find(&(0..HOLE), &mut held);
    discard(&mut held);
    assert_eq!(files.holes(), BTreeSet::from([3, 4, 255]));
    files.fill();
    let tally = balloon.deflate(&pages(&[4, 5]));
    assert_eq!(
        tally,
        Tally {
            moved: 1,
            repeated: 1,
            outside: 0
        }
    );
    balloon.inflate(&pages(&[4]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::from([4]));
}

#[test]
fn a_granule_waits_for_its_last_page() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, 8 * PAGE);
    let mut pieces = Pieces::default();
    balloon.inflate(&pages(&[8, 9, 10, 11, 12, 13, 14]), &mut pieces);
    balloon.deflate(&pages(&[8]));
    balloon.inflate(&pages(&[15]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::new());
    balloon.inflate(&pages(&[8]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), (8..16).collect());
}

#[test]
fn pages_that_may_be_in_use_complete_no_granule() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, 4 * PAGE);
    let mut pieces = Pieces::default();
    balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
    balloon.settle();
    balloon.inflate(&pages(&[11, 12, 13, 14, 15]), &mut pieces);
    balloon.settle();
    balloon.deflate(&pages(&[8]));
    discard(&mut pieces);
    assert_eq!(files.holes(), (12..16).collect());
}

#[test]
fn an_emptied_balloon_forgets_half_a_granule() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, 2 * PAGE);
    let mut pieces = Pieces::default();
    balloon.inflate(&pages(&[8]), &mut pieces);
    balloon.empty();
    balloon.inflate(&pages(&[9]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::new());
}

#[test]
fn memory_that_is_sent_again_keeps_its_balloon() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, 2 * PAGE);
    balloon.inflate(&pages(&[8]), &mut Pieces::default());
    // The host's setting has changed, and the file keeps its granule.
    balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
    assert_eq!(balloon.granule(), Some(2 * PAGE));
    let mut pieces = Pieces::default();
    balloon.inflate(&pages(&[9]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::from([8, 9]));

    // So does memory with other region bounds.
    balloon.set_memory(
        &files.part(4 * PAGE, 16 * PAGE),
        Granularity::Bytes(2 * PAGE),
    );
    let tally = balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
    assert_eq!((tally.moved, tally.repeated), (1, 2));
    balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
    let tally = balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
    assert_eq!((tally.moved, tally.repeated), (0, 3));

    let others = MemoryFiles::new(1 << 20, 1 << 20);
    balloon.set_memory(&others.memory(), Granularity::Bytes(2 * PAGE));
    assert_eq!(balloon.inflate(&pages(&[8]), &mut pieces).moved, 1);
}

/// A front end removes memory and adds it again to change its bounds, with two messages.
#[test]
fn memory_that_comes_back_keeps_its_balloon() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = balloon(&files, PAGE);
    let mut pieces = Pieces::default();
    balloon.inflate(&pages(&[8, 9]), &mut pieces);
    balloon.set_memory(&files.part(16 * PAGE, 32 * PAGE), Granularity::Bytes(PAGE));
    assert_eq!(balloon.known_ranges().first(), Some(&(0..256)));
    // The guest deflates a page meanwhile.
    let tally = balloon.deflate(&pages(&[9]));
    assert_eq!((tally.moved, tally.outside), (0, 1));
    balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
    let tally = balloon.inflate(&pages(&[8, 9]), &mut pieces);
    assert_eq!((tally.moved, tally.repeated), (1, 1));
    assert_eq!(balloon.known_ranges(), balloon.memory_ranges());
    // A new driver does not know it.
    balloon.set_memory(&files.part(16 * PAGE, 32 * PAGE), Granularity::Bytes(PAGE));
    balloon.empty();
    balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
    assert_eq!(balloon.inflate(&pages(&[8]), &mut pieces).moved, 1);
}

/// The balloon of a new worker, with granules of two pages.
fn kept_balloon(files: &MemoryFiles, kept: &File) -> Balloon {
    let mut balloon = Balloon::default();
    balloon.keep(kept.try_clone().unwrap());
    balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
    balloon
}

#[test]
fn another_process_knows_what_is_in_the_balloon() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let kept = memory_file(0);
    let process = || kept_balloon(&files, &kept);
    let mut first = process();
    let high = HOLE / PAGE;
    let ranges = [3..5, 100..101, high + 1..high + 2];
    first.inflate(&ranges, &mut Pieces::default());
    first.write_down(&ranges);
    first.deflate(&pages(&[4]));
    first.write_down(&pages(&[4]));
    // Messages whose state was not stored were not used, and are repeated.
    first.inflate(&pages(&[50]), &mut Pieces::default());

    let mut second = process();
    second.refill();
    let mut pieces = Pieces::default();
    assert_eq!(
        second
            .inflate(&pages(&[3, 100, high + 1]), &mut pieces)
            .repeated,
        3
    );
    assert_eq!(second.inflate(&pages(&[2, 4, 50]), &mut pieces).moved, 3);
    discard(&mut pieces);
    assert_eq!(
        files.holes(),
        BTreeSet::from([2, 3]),
        "it was half a granule"
    );

    second.empty();
    let blocks = kept.metadata().unwrap().blocks();
    assert_eq!(
        blocks,
        2 * 8,
        "only the table of regions and its place take memory"
    );
    assert_eq!(process().deflate(&pages(&[3, 100, high + 1])).moved, 0);
}

#[test]
fn another_vm_does_not_get_the_status() {
    let kept = memory_file(0);
    let status = Status {
        actual: 5,
        stop_reason: 0,
    };
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let mut first = kept_balloon(&files, &kept);
    first.inflate(&pages(&[8]), &mut Pieces::default());
    first.write_down(&pages(&[8]));
    first.write_status_down(status);
    assert_eq!(kept_balloon(&files, &kept).status(), status);

    let others = MemoryFiles::new(1 << 20, 1 << 20);
    let mut other = kept_balloon(&others, &kept);
    assert_eq!(other.status(), Status::default());
    other.write_down(&[]);
    assert_eq!(other.known_ranges(), other.memory_ranges());
    assert_eq!(kept_balloon(&others, &kept).status(), Status::default());
    let mut again = kept_balloon(&files, &kept);
    assert_eq!(again.status(), Status::default());
    assert_eq!(again.deflate(&pages(&[8])).moved, 0);
}

/// A front end adds memory piece by piece, and a worker may be killed between two pieces, and at each step of writing
/// the file.
#[test]
fn a_worker_that_is_killed_loses_nothing() {
    let status = Status {
        actual: 5,
        stop_reason: 2,
    };
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let (high, granule) = (HOLE / PAGE, Granularity::Bytes(PAGE));
    let kept = memory_file(0);
    let open = |kept: &File| {
        let mut balloon = Balloon::default();
        balloon.keep(kept.try_clone().unwrap());
        balloon
    };
    // Which of these pages are in the balloon, and the status, for a worker with all memory.
    let found = |kept: &File| {
        let mut balloon = open(kept);
        balloon.set_memory(&files.memory(), granule);
        let mut holds = |page| balloon.deflate(&pages(&[page])).moved == 1;
        let held = [3, 200, high, 20, 201].map(&mut holds);
        (held, balloon.status())
    };
    let mut first = open(&kept);
    first.set_memory(&files.memory(), granule);
    first.inflate(&pages(&[3, 200, high]), &mut Pieces::default());
    first.write_down(&pages(&[3, 200, high]));
    first.write_status_down(status);

    let mut second = open(&kept);
    // The low memory is absent at first, and then one part of it.
    let changes: [&dyn Fn(&mut Balloon); 6] = [
        &|balloon| balloon.set_memory(&files.part(0, 64 * PAGE), granule),
        &|balloon| {
            balloon.inflate(&pages(&[20]), &mut Pieces::default());
            balloon.write_down(&pages(&[20]));
        },
        &|balloon| {
            balloon.deflate(&pages(&[200]));
            balloon.write_down(&pages(&[200]));
        },
        &|balloon| balloon.set_memory(&files.memory(), granule),
        &|balloon| {
            balloon.inflate(&pages(&[201]), &mut Pieces::default());
            balloon.write_down(&pages(&[201]));
        },
        &|balloon| {
            balloon.deflate(&pages(&[3]));
            balloon.write_down(&pages(&[3]));
        },
    ];
    let expected = [
        [true, true, true, false, false],
        [true, true, true, true, false],
        [true, false, true, true, false],
        [true, false, true, true, false],
        [true, false, true, true, true],
        [false, false, true, true, true],
    ];
    let mut before = expected[0];
    for (change, after) in changes.iter().zip(expected) {
        for left in left_when_killed(|| change(&mut second)) {
            let (held, left) = found(&left);
            assert!(held == before || held == after, "{held:?}");
            assert_eq!(left, status);
        }
        assert_eq!(found(&kept), (after, status));
        before = after;
    }
}

/// A worker knows by any piece of memory that comes first whose status the file has.
#[test]
fn a_piece_that_was_not_stored_does_not_lose_the_status() {
    let kept = memory_file(0);
    let status = Status {
        actual: 5,
        stop_reason: 0,
    };
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    kept_balloon(&files, &kept).write_status_down(status);
    let other = MemoryFiles::new(1 << 20, 1 << 20);
    let mut balloon = Balloon::default();
    balloon.keep(kept.try_clone().unwrap());
    // It was plugged a moment ago.
    balloon.set_memory(&other.part(0, 1 << 20), Granularity::Bytes(PAGE));
    assert_eq!(balloon.status(), Status::default());
    balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
    assert_eq!(balloon.status(), status);
}

/// The next worker must not count a page as in the balloon if its deflation was not stored.
#[test]
fn a_file_that_cannot_be_written_is_given_up() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let kept = memory_file(0);
    let process = || kept_balloon(&files, &kept);
    let mut first = process();
    first.inflate(&pages(&[8]), &mut Pieces::default());
    first.write_down(&pages(&[8]));
    fcntl(&*kept, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    first.deflate(&pages(&[8]));
    first.write_down(&pages(&[8]));

    let mut second = process();
    second.refill();
    let mut pieces = Pieces::default();
    second.inflate(&pages(&[9]), &mut pieces);
    discard(&mut pieces);
    assert_eq!(files.holes(), BTreeSet::new());
}

#[test]
fn reported_ranges_are_trimmed_inward() {
    let files = MemoryFiles::new(1 << 20, 1 << 20);
    let balloon = balloon(&files, 4 * PAGE);
    let mut pieces = Pieces::default();
    let inside = balloon.whole_granules(&(PAGE..13 * PAGE), &mut pieces);
    assert_eq!(inside, 12 * PAGE);
    // The range extends past the region's end.
    let inside = balloon.whole_granules(&((1 << 20) - PAGE..(1 << 20) + PAGE), &mut pieces);
    assert_eq!(inside, PAGE);
    discard(&mut pieces);
    assert_eq!(files.holes(), (4..12).collect());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest lists, the holes are exactly the complete granules of the balloon.
    #[test]
    fn holes_are_the_whole_granules(
        batches in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(0_u64..700, 0..200), 0_u64..600, 0_u64..200), 0..8),
        shift in 0_u32..4,
    ) {
        let granule_pages = 1_u64 << shift;
        // The second region begins and ends in the middle of a granule of the file.
        let files = MemoryFiles::new(129 * PAGE, 130 * PAGE);
        let mut balloon = balloon(&files, granule_pages * PAGE);
        let mut held = BTreeSet::new();
        let mut holes = BTreeSet::new();
        for (inflate, named, first, length) in batches {
            let mut ranges = pages(&named);
            ranges.push(first..first + length);
            ranges.sort_unstable_by_key(|range| range.start);
            let mut pieces = Pieces::default();
            if inflate {
                balloon.inflate(&ranges, &mut pieces);
                discard(&mut pieces);
            } else {
                balloon.deflate(&ranges);
            }
            for page in ranges.into_iter().flatten().filter_map(|page| files.file_page(page)) {
                if inflate { held.insert(page); } else { held.remove(&page); }
            }
            // The regions share the granule in the file between them, which is complete in neither.
            let whole = |page: u64| {
                let start = page / granule_pages * granule_pages;
                let granule = start..start + granule_pages;
                granule.clone().all(|page| held.contains(&page))
                    && (granule.end <= 129 || granule.start >= 129)
            };
            if inflate {
                holes.extend(held.iter().copied().filter(|&page| whole(page)));
            }
            prop_assert_eq!(files.holes(), holes.clone());
        }
    }
}
