// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reporting queue. With the input's option the guest relies on the content of free pages.

#![no_main]

use std::ops::Range;

use fuzz::{Guest, Input, PAGE, bytes, page};
use libfuzzer_sys::fuzz_target;
use vhost_user_balloon::counters::Counters;
use vhost_user_balloon::memory::discard::{Discarder, Pieces};
use vhost_user_balloon::queues::reporting::Reporting;
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

    let mut ranges: Vec<_> = seen
        .buffers
        .iter()
        .filter(|buffer| buffer.is_write_only())
        .map(|buffer| {
            let start = buffer.addr().raw_value();
            start..start.saturating_add(buffer.len().into())
        })
        .collect();
    let named: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    // The guest has no pages beyond those that fit into a set.
    let set = |first: u64, end: u64| {
        (first..end.min(u64::BITS.into())).fold(0, |pages, number| pages | page(number))
    };
    // One range may begin in a page, and another one end there.
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in &ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range.clone()),
        }
    }
    let whole = joined.iter().fold(0, |pages, range| {
        pages | set(range.start.div_ceil(PAGE), range.end / PAGE)
    });
    let mut allowed = guest.whole(whole);
    let mut most = ranges
        .iter()
        .map(|range| bytes(allowed & set(range.start / PAGE, range.end.div_ceil(PAGE))))
        .sum();
    if input.option {
        (allowed, most) = (0, 0);
    }
    let gone = guest.check_holes(allowed);
    let discarded = counters.discarded.get();
    assert!(gone <= discarded && discarded <= most);
    assert_eq!(counters.discard_failures.get(), 0);
    assert!(counters.reported.get() <= named);
});
