// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The deflate queue. The input's word is the content of the balloon before, and its option enables
//! prefaulting.

#![no_main]

use fuzz::{Guest, Input, PAGE, PAGES, bytes, in_memory, ranges};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::memory::discard::{Discarder, Pieces};
use vhost_user_balloon::queues::deflate::Deflate;
use vhost_user_balloon::queues::pages::Pages;

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let guest = Guest::new(input);
    let held = in_memory(input.word);
    let mut balloon = guest.balloon(held);
    let counters = Counters::default();
    let mut discarder = Discarder::default();
    let mut deflate = Deflate {
        memory: &guest.memory,
        balloon: &mut balloon,
        discarder: &mut discarder,
        prefault: input.option,
        told_before_use: false,
        begun: false,
        format: input.format,
        counters: &counters,
        pages: &mut Pages::default(),
        pieces: &mut Pieces::default(),
    };
    let named = guest.serve(&counters, &mut deflate).named;

    guest.check_holes(0);
    let deflated = counters.deflated.get();
    assert!(deflated <= bytes(named & held));
    // Pages that are still in the balloon cannot be inflated again.
    let rest = balloon.inflate(&ranges(u64::MAX), &mut Pieces::default());
    assert_eq!(rest.moved + (bytes(held) - deflated) / PAGE, PAGES);
});
