// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::discard::Granularity;
use crate::memory::page_map::PageMap;
use crate::queues::requests::{MAX_RANGES, MAX_REQUESTS, TooMany};
use crate::testing::{GuestQueue, PAGE};
use balloon_control::Progress;
use balloon_wire::request::Command;
use balloon_wire::request::Wanted;
use proptest::prelude::*;
use vm_memory::GuestAddress;

/// The addresses of the driver's buffers for requests, and of the listed memory, in bytes.
const BUFFERS: u64 = 0x10000;
const NAMED: u64 = 1 << 20;
/// The first page of that memory.
const FIRST: u64 = NAMED / PAGE;

const ALL: Wanted = Wanted {
    block_shift: 12,
    start: 0,
    end: 0,
};

/// A driver, and the device's side of its queue.
struct World {
    guest: GuestQueue,
    balloon: Balloon,
    requests: Mutex<Requests>,
    counters: Counters,
    messages: Counter,
    /// Whether the guest relies on the content of free pages.
    keep: bool,
    budget: Budget,
    done: u64,
    /// How many buffers for requests the driver has made available.
    offered: u64,
}

impl World {
    fn new() -> Self {
        let guest = GuestQueue::new();
        guest
            .memory
            .write_slice(&[1; 16 * 4096], GuestAddress(NAMED))
            .unwrap();
        let mut balloon = Balloon::default();
        balloon.set_memory(&guest.memory, Granularity::Bytes(PAGE));
        Self {
            guest,
            balloon,
            requests: Mutex::default(),
            counters: Counters::default(),
            messages: Counter::default(),
            keep: false,
            budget: Budget::UNLIMITED,
            done: 0,
            offered: 0,
        }
    }

    fn serve(&mut self) -> bool {
        let mut answers = Answers {
            memory: &self.guest.memory,
            requests: &self.requests,
            balloon: &self.balloon,
            discarder: &mut Discarder::default(),
            counters: &self.counters,
            keep: self.keep,
            pieces: &mut Pieces::default(),
            budget: self.budget,
            done: &mut self.done,
        };
        answers.serve(&mut self.guest.vring(), &self.messages) != Next::Notified
    }

    /// Makes buffers for requests available, with stale bytes in them.
    fn offer(&mut self, buffers: u64) {
        for _ in 0..buffers {
            let place = BUFFERS + 64 * self.offered;
            self.guest
                .memory
                .write_slice(&[0xa5; 64], GuestAddress(place))
                .unwrap();
            self.guest.send_writable(&[(place, 40)]);
            self.offered += 1;
        }
    }

    fn begin(&mut self, command: Command) -> u64 {
        let pages = self.balloon.no_pages();
        lock(&self.requests).begin(command, pages).unwrap()
    }

    /// A request that the driver has seen.
    fn asked(&mut self, command: Command) -> u64 {
        let id = self.begin(command);
        self.offer(1);
        self.serve();
        assert_eq!(self.status(id), RequestStatus::Open);
        id
    }

    fn progress(&self, id: u64) -> Progress {
        lock(&self.requests).progress(id).unwrap()
    }

    fn status(&self, id: u64) -> RequestStatus {
        self.progress(id).status
    }

    /// The content of one of the driver's buffers.
    fn buffer(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; 40];
        self.guest
            .memory
            .read_slice(&mut bytes, GuestAddress(BUFFERS + 64 * number))
            .unwrap();
        bytes
    }

    /// Answers with pages of the memory from [`FIRST`] on.
    fn name(&mut self, command: u32, id: u64, pages: Range<u64>) {
        // Pages of 4 KiB, as ranges, with the flag for more messages.
        let first = u64::from(command) | (12 << 16) | (1 << 24) | (1 << 32);
        let count = pages.end - pages.start;
        let words = [first, id, 0, count, ((FIRST + pages.start) << 12) | count];
        self.guest.send(&[&words.map(u64::to_le_bytes).concat()]);
    }

    /// The same, with two ranges.
    fn name_both(&mut self, command: u32, id: u64, pages: [Range<u64>; 2]) {
        let first = u64::from(command) | (12 << 16) | (1 << 24) | (1 << 32);
        let count: u64 = pages.iter().map(|pages| pages.end - pages.start).sum();
        let [one, other] =
            pages.map(|pages| ((FIRST + pages.start) << 12) | (pages.end - pages.start));
        let words = [first, id, 0, count, one, other];
        self.guest.send(&[&words.map(u64::to_le_bytes).concat()]);
    }

    fn complete(&mut self, status: u8, id: u64) {
        let first = [7, 0, status, 0, 0, 0, 0, 0];
        self.guest.send(&[&first, &id.to_le_bytes()]);
    }

    /// The pages in the client's answer.
    fn pages(&self, id: u64) -> Vec<u64> {
        let ranges = lock(&self.requests).ranges(id, 0).unwrap();
        assert_eq!((ranges.id, ranges.end, ranges.next), (id, 16 << 20, None));
        let pages = |(start, bytes): (u64, u64)| start / PAGE..(start + bytes) / PAGE;
        ranges.ranges.into_iter().flat_map(pages).collect()
    }

    /// The first bytes of some of the listed memory.
    fn contents(&self) -> Vec<u8> {
        (0..5)
            .map(|page| {
                let place = GuestAddress(NAMED + page * PAGE);
                self.guest.memory.read_obj(place).unwrap()
            })
            .collect()
    }

    fn malformed(&self) -> u64 {
        self.counters.refused(Refusal::Malformed)
    }
}

/// HR-V2
#[test]
fn a_request_waits_for_a_buffer_and_fills_it() {
    let mut world = World::new();
    let id = world.begin(Command::DropCaches {
        pages: true,
        slab: true,
    });
    assert!(!world.serve());
    assert_eq!(world.status(id), RequestStatus::Waiting);
    world.offer(2);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Open);
    let request = Command::DropCaches {
        pages: true,
        slab: true,
    }
    .encode(id);
    assert_eq!(world.buffer(0), [&request[..], &[0xa5; 8]].concat());
    assert_eq!(world.buffer(1), [0xa5; 40]);
    assert_eq!((world.guest.used(), world.guest.next_avail()), (1, 1));
    assert_eq!(world.guest.used_element(0), (0, 32));
    // The driver must notify the device of buffers after the remaining one.
    assert_eq!(world.guest.avail_event(), 2);
    world.complete(1, id);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Complete);
    assert_eq!(world.messages.get(), 1);
}

/// HR-V9
#[test]
fn buffers_in_front_of_a_message_come_back_empty() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedSkip(ALL));
    world.offer(2);
    world.serve();
    assert_eq!(world.guest.used(), 1);
    world.name(3, id, 0..1);
    world.offer(1);
    world.serve();
    // In the order of arrival, with the newest one left.
    assert_eq!((world.guest.used(), world.guest.next_avail()), (4, 4));
    let used = |number| world.guest.used_element(number);
    assert_eq!([1, 2, 3].map(used), [(1, 0), (2, 0), (3, 0)]);
    assert_eq!(world.buffer(1), [0xa5; 40]);
    assert_eq!(world.pages(id), [FIRST]);
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let mut world = World::new();
    let id = world.begin(Command::UnusedSkip(ALL));
    let pieces = [(BUFFERS, 3), (BUFFERS + 64, 0), (BUFFERS + 128, 30)];
    world.guest.send_writable(&pieces);
    world.serve();
    let request = Command::UnusedSkip(ALL).encode(id);
    assert_eq!(world.buffer(0)[..3], request[..3]);
    assert_eq!(world.buffer(2)[..29], request[3..]);
}

/// HR-V1, HR-V8
#[test]
fn ids_are_never_those_of_open_requests() {
    let mut requests = Requests::after(u64::MAX - 1);
    let mut begin = || requests.begin(Command::UnusedSkip(ALL), PageMap::default());
    assert_eq!(begin(), Ok(u64::MAX));
    assert_eq!(begin(), Ok(1));
    requests.last = u64::MAX - 1;
    let next = requests.begin(Command::UnusedSkip(ALL), PageMap::default());
    assert_eq!(next, Ok(2));
    assert!(
        Requests::default().last > 1 << 40,
        "an id of another worker"
    );
}

/// HR-V3
#[test]
fn pages_to_skip_are_left_alone() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedSkip(ALL));
    world.name(3, id, 0..2);
    world.name(3, id, 4..5);
    world.name(3, id, 1..3);
    // There is no such memory.
    world.name(3, id, 5000..5001);
    world.complete(1, id);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Complete);
    assert_eq!(world.pages(id), [0, 1, 2, 4].map(|page| FIRST + page));
    assert_eq!(world.progress(id).named, 4 * PAGE);
    assert_eq!(world.progress(id).discarded, 0);
    assert_eq!(world.contents(), [1; 5]);
    assert_eq!(world.counters.refused(Refusal::OutsideMemory), 1);
    assert_eq!(world.guest.used(), 6);
}

/// HR-V5
#[test]
fn pages_to_discard_are_given_back() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedDiscard(ALL));
    world.name(4, id, 1..3);
    world.serve();
    assert_eq!(world.contents(), [1, 0, 0, 1, 1]);
    assert_eq!(world.guest.used(), 2);
    let Progress {
        named, discarded, ..
    } = world.progress(id);
    assert_eq!((named, discarded), (2 * PAGE, 2 * PAGE));
    // The guest owns the used buffers again.
    world
        .guest
        .memory
        .write_slice(&[7; 4096], GuestAddress(NAMED + PAGE))
        .unwrap();
    world.complete(1, id);
    world.serve();
    assert_eq!(world.contents(), [1, 7, 0, 1, 1]);
}

#[test]
fn others_have_their_turn_between_two_messages_that_take_long() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedDiscard(ALL));
    world.name(4, id, 1..2);
    world.name(4, id, 3..4);
    world.budget = Budget::spent();
    assert!(world.serve());
    assert_eq!(world.contents(), [1, 0, 1, 1, 1]);
    assert!(world.serve());
    assert_eq!(world.contents(), [1, 0, 1, 0, 1]);
    assert!(!world.serve());
}

#[test]
fn others_have_their_turn_within_a_message_that_takes_long() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedDiscard(ALL));
    // Two pieces, and two turns.
    world.name_both(4, id, [0..1, 3..4]);
    world.budget = Budget::spent();
    let used = world.guest.used();
    assert!(world.serve());
    assert_eq!(world.contents(), [0, 1, 1, 1, 1]);
    let now = world.progress(id);
    assert_eq!(
        (now.named, now.discarded, world.guest.used()),
        (0, PAGE, used)
    );
    world.serve();
    assert_eq!(world.contents(), [0, 1, 1, 0, 1]);
    let now = world.progress(id);
    assert_eq!((now.named, now.discarded), (2 * PAGE, 2 * PAGE));
    assert_eq!(world.guest.used(), used + 1);
    assert_eq!(world.messages.get(), 1);
    assert_eq!(world.counters.snapshot().encodings["ranges"], 1);
}

/// HR-V5
#[test]
fn poisoned_pages_are_left_alone() {
    let mut world = World::new();
    world.keep = true;
    let id = world.asked(Command::UnusedDiscard(ALL));
    world.name(4, id, 0..3);
    world.serve();
    assert_eq!(world.contents(), [1; 5]);
    let Progress {
        named, discarded, ..
    } = world.progress(id);
    assert_eq!((named, discarded), (3 * PAGE, 0));
}

#[test]
fn parts_of_granules_are_not_given_back() {
    let mut world = World::new();
    // A balloon that knows the file keeps its granule.
    world.balloon = Balloon::default();
    world
        .balloon
        .set_memory(&world.guest.memory, Granularity::Bytes(2 * PAGE));
    let id = world.asked(Command::UnusedDiscard(ALL));
    world.name(4, id, 1..4);
    world.serve();
    assert_eq!(world.contents(), [1, 1, 0, 0, 1]);
    assert_eq!(world.progress(id).discarded, 2 * PAGE);
}

/// HR-V6
#[test]
fn messages_of_no_open_request_are_refused() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedDiscard(ALL));
    let waiting = world.begin(Command::UnusedDiscard(ALL));
    let drop = Command::DropCaches {
        pages: true,
        slab: false,
    };
    world.name(4, id + 7, 0..1);
    world.name(4, waiting, 0..1);
    world.name(3, id, 0..1);
    world.name(1, id, 0..1);
    world.complete(1, id + 7);
    world.complete(1, waiting);
    world.complete(0, id);
    world.guest.send(&[b"short"]);
    world.serve();
    assert_eq!(world.malformed(), 8);
    assert_eq!(world.contents(), [1; 5]);
    assert_eq!(world.status(id), RequestStatus::Open);
    assert_eq!(world.status(waiting), RequestStatus::Waiting);

    world.complete(1, id);
    world.name(4, id, 0..1);
    world.complete(1, id);
    world.serve();
    assert_eq!(world.malformed(), 10);
    assert_eq!(world.contents(), [1; 5]);
    assert_eq!(world.guest.used(), 12);

    let caches = world.begin(drop);
    world.offer(2);
    world.serve();
    world.name(4, caches, 0..1);
    world.serve();
    assert_eq!(world.malformed(), 11);
    assert_eq!(world.contents(), [1; 5]);
}

/// PS-V6
#[test]
fn what_is_neither_kind_of_buffer_is_refused() {
    let mut world = World::new();
    let id = world.begin(Command::UnusedSkip(ALL));
    world.guest.send_writable(&[(BUFFERS, 31)]);
    world.guest.send_mixed(BUFFERS, 64);
    world.guest.send(&[b""]);
    world.guest.send_writable(&[((16 << 20) - 8, 32)]);
    world.guest.send_loop();
    world.guest.send_outside();
    world.guest.send(&[&vec![0; page_set::MAX_SIZE + 1]]);
    world.serve();
    assert_eq!(world.malformed(), 3);
    for reason in [Refusal::BadChain, Refusal::TooLong] {
        assert_eq!(world.counters.refused(reason), 1, "{reason}");
    }
    assert_eq!(world.counters.refused(Refusal::BadBuffer), 2);
    assert_eq!(world.guest.used(), 7);
    assert!((0..7).all(|number| world.guest.used_element(number).1 == 0));
    assert_eq!(world.status(id), RequestStatus::Waiting);
}

#[test]
fn a_message_is_found_behind_many_buffers() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedSkip(ALL));
    world.offer(MAX_BATCH as u64 + 9);
    world.complete(1, id);
    assert!(world.serve(), "there is more");
    assert_eq!(world.counters.refused(Refusal::TooManyBuffers), 1);
    assert!(!world.serve());
    assert_eq!(world.status(id), RequestStatus::Complete);
    assert_eq!(usize::from(world.guest.used()), 1 + MAX_BATCH + 9 + 1);
}

/// HR-V7
#[test]
fn what_came_before_the_end_holds() {
    for (number, status) in [
        (2, RequestStatus::Aborted),
        (3, RequestStatus::Cancelled),
        (4, RequestStatus::Unsupported),
        (5, RequestStatus::Malformed),
        (6, RequestStatus::UnknownId),
    ] {
        let mut world = World::new();
        let id = world.asked(Command::UnusedSkip(ALL));
        world.name(3, id, 0..2);
        world.complete(number, id);
        world.name(3, id, 3..4);
        world.serve();
        assert_eq!(world.status(id), status);
        assert_eq!(world.pages(id), [FIRST, FIRST + 1]);
        let counters = world.counters.snapshot();
        assert_eq!((counters.asked, counters.unused), (1, 2 * PAGE));
        assert_eq!(counters.answered, [(status, 1)].into());
        // Two page sets and a completion.
        assert_eq!(counters.received.requests, 2 * 40 + 16);
        assert_eq!(counters.encodings["ranges"], 2);
    }
}

/// HR-V8
#[test]
fn no_request_is_open_after_a_reset() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedDiscard(ALL));
    let waiting = world.begin(Command::UnusedSkip(ALL));
    lock(&world.requests).restart();
    world.guest.reset();
    world.name(4, id, 0..2);
    world.complete(1, id);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Reset);
    assert_eq!(world.malformed(), 2);
    assert_eq!(world.contents(), [1; 5]);
    // The driver before it has not seen this one.
    assert_eq!(world.status(waiting), RequestStatus::Waiting);
    world.offer(1);
    world.serve();
    assert_eq!(world.status(waiting), RequestStatus::Open);
    lock(&world.requests).disconnect(&world.counters);
    assert_eq!(world.status(waiting), RequestStatus::Reset);
    let answered = world.counters.snapshot().answered;
    assert_eq!(answered, [(RequestStatus::Reset, 2)].into());
    assert!(world.begin(Command::UnusedSkip(ALL)) > waiting);
}

#[test]
fn a_queue_that_was_stopped_goes_on() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedSkip(ALL));
    world.offer(2);
    world.serve();
    lock(&world.requests).restart();
    world.name(3, id, 0..1);
    world.complete(1, id);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Complete);
    // Another worker would continue the queue there.
    assert_eq!(world.guest.next_avail(), world.guest.used());
}

#[test]
fn requests_are_answered_side_by_side() {
    let mut world = World::new();
    let skip = world.asked(Command::UnusedSkip(ALL));
    let discard = world.asked(Command::UnusedDiscard(ALL));
    world.name(3, skip, 0..1);
    world.name(4, discard, 1..2);
    world.name(3, skip, 2..3);
    world.complete(1, discard);
    world.complete(1, skip);
    while world.serve() {}
    assert_eq!(world.pages(skip), [FIRST, FIRST + 2]);
    assert!(world.pages(discard).is_empty());
    assert_eq!(world.contents(), [1, 0, 1, 1, 1]);
    assert_eq!(world.malformed(), 0);
    assert_eq!(lock(&world.requests).open(), 0);
}

#[test]
fn a_cancel_is_a_request_of_its_own() {
    let mut world = World::new();
    let id = world.asked(Command::UnusedSkip(ALL));
    for _ in 0..2 {
        lock(&world.requests).cancel(id).unwrap();
    }
    world.offer(2);
    world.serve();
    assert_eq!(world.guest.used(), 2, "one cancel is enough");
    let cancel = id + 1;
    assert_eq!(world.buffer(1)[..32], Command::Cancel { id }.encode(cancel));
    assert_eq!(lock(&world.requests).progress(cancel), None);
    world.name(3, id, 0..1);
    world.complete(3, id);
    world.complete(1, cancel);
    world.serve();
    assert_eq!(world.status(id), RequestStatus::Cancelled);
    assert_eq!(world.pages(id), [FIRST]);
    assert_eq!(lock(&world.requests).open(), 0);

    // The guest has not seen this one.
    let id = world.begin(Command::UnusedSkip(ALL));
    lock(&world.requests).cancel(id).unwrap();
    assert_eq!(world.status(id), RequestStatus::Cancelled);
}

#[test]
fn a_few_requests_are_kept() {
    let mut world = World::new();
    let first = world.asked(Command::UnusedSkip(ALL));
    let others: Vec<_> = (1..MAX_REQUESTS)
        .map(|_| world.begin(Command::UnusedSkip(ALL)))
        .collect();
    let begin =
        |world: &World| lock(&world.requests).begin(Command::UnusedSkip(ALL), PageMap::default());
    assert_eq!(begin(&world), Err(TooMany));
    // Each of them can still be cancelled.
    world.offer(3);
    world.serve();
    for &id in others.iter().chain([&first]) {
        lock(&world.requests).cancel(id).unwrap();
    }
    world.complete(1, first);
    world.serve();
    let next = begin(&world).unwrap();
    assert_eq!(lock(&world.requests).progress(first), None);
    assert!(
        others
            .iter()
            .all(|&id| world.status(id) == RequestStatus::Open)
    );
    assert_eq!(world.status(next), RequestStatus::Waiting);
}

#[test]
fn a_long_answer_is_read_in_parts() {
    let mut map = PageMap::new(std::iter::once(0..4 * MAX_RANGES as u64));
    for page in 0..2 * MAX_RANGES as u64 {
        map.add(&(2 * page..2 * page + 1));
    }
    let mut requests = Requests::default();
    let id = requests.begin(Command::UnusedSkip(ALL), map).unwrap();
    let first = requests.ranges(id, 0).unwrap();
    assert_eq!(first.ranges.len(), MAX_RANGES);
    assert_eq!(first.next, Some(2 * MAX_RANGES as u64 * PAGE));
    let second = requests.ranges(id, first.next.unwrap()).unwrap();
    assert_eq!(second.ranges.len(), MAX_RANGES);
    assert_eq!(second.ranges[0], (first.next.unwrap(), PAGE));
    assert_eq!(second.next, None);
    assert_eq!(requests.ranges(id + 1, 0), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the order of buffers and requests, the device uses buffers in order and sends each request
    /// once. Only buffers for requests remain in the ring.
    #[test]
    fn buffers_are_used_in_order(steps in prop::collection::vec(0_u8..6, 0..40)) {
        let mut world = World::new();
        let (mut sent, mut asked, mut open) = (0_u16, 0, Vec::new());
        for step in steps {
            match step {
                0 if world.offered < 40 => {
                    world.offer(1);
                    sent += 1;
                }
                1 if lock(&world.requests).open() < MAX_REQUESTS as u64 => {
                    let caches = Command::DropCaches { pages: true, slab: false };
                    open.push(world.begin(caches));
                    asked += 1;
                }
                2 => {
                    if let Some(place) = open
                        .iter()
                        .position(|&id| world.status(id) == RequestStatus::Open)
                    {
                        let id = open.remove(place);
                        world.complete(1, id);
                        sent += 1;
                    }
                }
                3 => {
                    world.guest.send(&[b"nonsense"]);
                    sent += 1;
                }
                _ => {
                    while world.serve() {}
                }
            }
        }
        while world.serve() {}
        let used = world.guest.used();
        prop_assert_eq!(world.guest.next_avail(), used);
        prop_assert_eq!(world.guest.avail_event(), sent);
        let written = (0..used).filter(|&n| world.guest.used_element(n).1 == 32).count();
        let waiting = open
            .iter()
            .filter(|&&id| world.status(id) == RequestStatus::Waiting)
            .count();
        prop_assert_eq!(written + waiting, asked);
        // There is either no request or no buffer for it.
        prop_assert!(waiting == 0 || used == sent);
    }
}
