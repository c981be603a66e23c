// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The statistics queue, with pressure notices or without. Each byte of the input's word is a step: an action of the host,
//! and the number of messages that the guest then makes available.

#![no_main]

use fuzz::{Guest, Input};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::{Counter, Counters};
use vhost_user_balloon::queues::stats::Stats;

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let mut guest = Guest::new(input);
    let mut stats = Stats::default();
    let notices = input.option;
    let (counters, messages) = (Counters::default(), Counter::default());
    // The first buffer goes back unread, here and after each restart.
    let (mut wishes, mut granted) = (1, 0);
    for step in input.word.to_le_bytes() {
        match step % 4 {
            0 => stats.want(),
            1 => stats.restart(),
            _ => {}
        }
        wishes += u16::from(step % 4 < 2);
        guest.publish((step / 32).into());
        let size = (step % 8 < 4).then_some(0);
        granted += guest.watch(|vring| {
            stats.serve(vring, &guest.memory, &counters, &messages, size, notices);
        });

        // Any other buffer is returned only for a request, or if there is a newer one, and has one sample at most.
        assert!(granted <= wishes || notices);
        assert!(stats.sequence() <= messages.get());
        let answer = stats.answer();
        assert_eq!(answer.map_or(0, |answer| answer.sequence), stats.sequence());
    }
    guest.check_holes(0);
});
