// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hinting queue. Each byte of the input's word is a step: an action of the host, and the number of
//! messages that the guest then makes available.

#![no_main]

use balloon_wire::{VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use fuzz::{Guest, Input};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::queues::hinting::{Hinting, Hints};
use vhost_user_balloon::sync::{Mutex, lock};

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let mut guest = Guest::new(input);
    let shared = Mutex::<Hints>::default();
    let counters = Counters::default();
    for step in input.word.to_le_bytes() {
        let mut hints = lock(&shared);
        match step % 8 {
            0 => hints.start(),
            1 => hints.stop(),
            2 => hints.done(),
            3 => hints.restart(),
            _ => {}
        }
        drop(hints);
        guest.publish((step / 32).into());
        let before = counters.hinted.get();
        let mut hinting = Hinting {
            memory: &guest.memory,
            hints: &shared,
            counters: &counters,
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
    guest.check_holes(0);
});
