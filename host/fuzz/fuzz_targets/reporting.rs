// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reporting queue. The input's option has free pages keep what they hold.

#![no_main]

use fuzz::{Guest, Input, PAGE, bytes, page};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::discard::{Discarder, Pieces};
use vhost_user_balloon::reporting::Reporting;
use vm_memory::Address;

fuzz_target!(|data: &[u8]| {
    let Some(input) = Input::new(data) else {
        return;
    };
    let guest = Guest::new(input);
    let counters = Counters::default();
    let mut reporting = Reporting {
        balloon: &guest.balloon(0),
        discarder: &mut Discarder::default(),
        counters: &counters,
        keep: input.option,
        ranges: &mut Vec::new(),
        pieces: &mut Pieces::default(),
    };
    let seen = guest.serve(&counters, &mut reporting);

    let (mut allowed, mut named, mut most) = (0, 0, 0);
    for buffer in seen.buffers.iter().filter(|b| b.is_write_only()) {
        let start = buffer.addr().raw_value();
        let end = start.saturating_add(buffer.len().into());
        // No page of the guest is behind those that fit into a set.
        let pages = start.div_ceil(PAGE)..(end / PAGE).min(u64::BITS.into());
        let range = pages.fold(0, |pages, number| pages | page(number));
        allowed |= guest.whole(range);
        named += end - start;
        most += bytes(guest.whole(range));
    }
    if input.option {
        (allowed, most) = (0, 0);
    }
    let gone = guest.check_holes(allowed);
    let discarded = counters.discarded.get();
    assert!(gone <= discarded && discarded <= most);
    assert_eq!(counters.discard_failures.get(), 0);
    assert!(counters.reported.get() <= named);
});
