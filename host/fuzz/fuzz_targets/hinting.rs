// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hinting queue. Each byte of the input's word is a step: an action of the host, and the number of
//! messages that the guest then makes available.

#![no_main]

use balloon_control::RequestStatus;
use balloon_wire::{VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use fuzz::{Guest, Input, PAGE, page};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::budget::Budget;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::queues::hinting::{Hinting, Hints};
use vhost_user_balloon::sync::{Mutex, lock};

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let mut guest = Guest::new(input);
    let balloon = guest.balloon(0);
    let shared = Mutex::<Hints>::default();
    let mut list = None;
    let counters = Counters::default();
    for step in input.word.to_le_bytes() {
        let mut hints = lock(&shared);
        match step % 8 {
            0 => list = Some(hints.start(balloon.no_pages())),
            1 => hints.stop(),
            2 => hints.done(),
            3 => hints.restart(),
            4 => hints.disconnect(),
            _ => {}
        }
        drop(hints);
        guest.publish((step / 32).into());
        let before = counters.hinted.get();
        let mut hinting = Hinting {
            memory: &guest.memory,
            hints: &shared,
            counters: &counters,
            budget: Budget::UNLIMITED,
        };
        let seen = guest.serve(&counters, &mut hinting);

        let hinted = counters.hinted.get();
        let buffers = seen.buffers.iter().filter(|b| b.is_write_only());
        let named: u64 = buffers.map(|buffer| u64::from(buffer.len())).sum();
        assert!(hinted - before <= named);
        // The device accepts no hints without a command.
        let idle = [VIRTIO_BALLOON_CMD_ID_STOP, VIRTIO_BALLOON_CMD_ID_DONE];
        assert!(hinted == before || !idle.contains(&lock(&shared).command()));
    }
    if let Some(id) = list {
        let hints = lock(&shared);
        let progress = hints.progress(id).expect("it is kept");
        let ranges = hints.ranges(id, 0).expect("it is kept").ranges;
        let numbers = |&(start, length)| start / PAGE..(start + length) / PAGE;
        let pages: Vec<_> = ranges.iter().flat_map(numbers).collect();
        assert!(pages.is_sorted() && pages.iter().all(|&number| page(number) != 0));
        assert_eq!(pages.len() as u64 * PAGE, progress.named);
        assert!(progress.named <= counters.hinted.get());
        assert!(progress.status != RequestStatus::Waiting || progress.named == 0);
    }
    guest.check_holes(0);
});
