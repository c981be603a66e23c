// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The inflate queue. The input's word is the content of the balloon before.

#![no_main]

use fuzz::{Guest, Input, PAGE, PAGES, bytes, in_memory, ranges};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::memory::discard::{Discarder, Pieces};
use vhost_user_balloon::queues::inflate::Inflate;
use vhost_user_balloon::queues::pages::Pages;

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    // Without the feature later messages do not complete granules: there are fewer holes, never
    // more.
    let told_before_use = input.word & 1 == 0;
    let guest = Guest::new(input);
    let held = in_memory(input.word);
    let mut balloon = guest.balloon(held);
    let counters = Counters::default();
    let mut inflate = Inflate {
        memory: &guest.memory,
        balloon: &mut balloon,
        told_before_use,
        begun: false,
        discarder: &mut Discarder::default(),
        format: input.format,
        counters: &counters,
        pages: &mut Pages::default(),
        pieces: &mut Pieces::default(),
        report: &|_| {},
    };
    let named = guest.serve(&counters, &mut inflate).named;

    // Granules that were complete before were returned before.
    let allowed = guest.whole(held | named) & !guest.whole(held);
    let gone = guest.check_holes(allowed);
    let discarded = counters.discarded.get();
    assert!(gone <= discarded && discarded <= bytes(allowed));
    assert_eq!(counters.discard_failures.get(), 0);

    let inflated = counters.inflated.get();
    assert!(inflated <= bytes(named & !held));
    assert!(bytes(held) + inflated <= PAGES * PAGE);
    // Pages that are in the balloon can be deflated.
    let out = balloon.deflate(&ranges(u64::MAX));
    assert_eq!(out.moved * PAGE, bytes(held) + inflated);
});
