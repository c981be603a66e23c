// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queue for host requests. Each byte of the input's word is a step: an action of the host, and the
//! number of messages that the guest then makes available. The device's clock is stopped, so ids start
//! from 1. With the input's option the guest relies on the content of free pages.

#![no_main]

use balloon_control::RequestStatus;
use balloon_wire::request::{Command, Wanted};
use fuzz::{Guest, Input, PAGE, PAGES, page};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::budget::Budget;
use vhost_user_balloon::counters::{Counter, Counters, Refusal};
use vhost_user_balloon::memory::discard::{Discarder, Pieces};
use vhost_user_balloon::queues::answers::Answers;
use vhost_user_balloon::queues::requests::Requests;
use vhost_user_balloon::queues::virtqueue::Next;
use vhost_user_balloon::sync::{Level, Mutex, lock};

/// The maximum number of requests: one for each step.
const IDS: u64 = 8;

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let mut guest = Guest::new(input);
    let balloon = guest.balloon(0);
    let requests = Mutex::new(Level::Short, Requests::after(0));
    let (counters, messages) = (Counters::default(), Counter::default());
    let all = Wanted {
        block_shift: 12,
        start: 0,
        end: 0,
    };
    let (mut discards, mut used) = (0, 0);
    for step in input.word.to_le_bytes() {
        let command = match step % 8 {
            0 => Some(Command::UnusedSkip(all)),
            1 => Some(Command::UnusedDiscard(all)),
            2 => Some(Command::DropCaches {
                pages: true,
                slab: false,
            }),
            _ => None,
        };
        {
            let mut requests = lock(&requests);
            if let Some(command) = command {
                // There may be too many.
                let begun = requests.begin(command, balloon.no_pages());
                discards += u64::from(begun.is_ok() && step % 8 == 1);
            }
            match step % 8 {
                3 => requests.restart(),
                4 => (1..IDS).for_each(|id| requests.cancel(id).unwrap_or_default()),
                5 => requests.disconnect(&counters),
                _ => {}
            }
        }
        guest.publish((step / 32).into());
        // Each turn uses a buffer, or has nothing to do.
        for _ in 0..=u8::MAX {
            let mut answers = Answers {
                memory: &guest.memory,
                requests: &requests,
                balloon: &balloon,
                discarder: &mut Discarder::default(),
                counters: &counters,
                keep: input.option,
                pieces: &mut Pieces::default(),
                budget: Budget::UNLIMITED,
                done: &mut 0,
            };
            let mut next = Next::Notified;
            // The device may write a request over the rings, so the content of their elements is
            // unknown.
            let (taken, completed) = guest.act(|vring| next = answers.serve(vring, &messages));
            assert!(completed <= taken);
            used += u64::from(completed);
            if next == Next::Notified {
                break;
            }
        }
    }

    let requests = lock(&requests);
    let mut named = 0;
    for progress in (1..=2 * IDS).filter_map(|id| requests.progress(id)) {
        assert!(progress.discarded <= progress.named);
        assert!(progress.status != RequestStatus::Waiting || progress.named == 0);
        let ranges = requests.ranges(progress.id, 0).expect("it is kept");
        let pages: Vec<_> = ranges
            .ranges
            .iter()
            .flat_map(|(start, length)| start / PAGE..(start + length) / PAGE)
            .collect();
        assert!(pages.is_sorted() && pages.iter().all(|&number| page(number) != 0));
        assert!(pages.len() as u64 <= PAGES);
        // A request has either pages that a client can read, or discarded memory.
        assert!(pages.is_empty() || progress.discarded == 0);
        named += progress.named;
    }
    assert!(named <= counters.unused.get());
    assert!(counters.asked.get() <= used);
    let answered: u64 = counters.snapshot().answered.values().sum();
    assert!(answered <= counters.asked.get());

    // The device writes only requests, perhaps into a part of a broken buffer, and discards memory for one request
    // only.
    let discarded = counters.discarded.get();
    assert!(discarded == 0 || (discards > 0 && !input.option));
    let written = counters.asked.get() + counters.refused(Refusal::BadBuffer);
    assert!(guest.changed() <= 32 * written + discarded);
    assert_eq!(counters.discard_failures.get(), 0);
});
