// SPDX-License-Identifier: GPL-2.0

//! What statistics there are in kernels that do not count everything.

use crate::{
    features::stats::collect,
    rust::{
        mm::info::Info,
        virtio::ByteOrder,
        virtio_balloon::{
            stat,
            Stat, //
        }, //
    }, //
};

use kernel::prelude::*;

/// What a kernel counts only if it is configured so.
const HUGETLB: [u16; 2] = [stat::HTLB_PGALLOC, stat::HTLB_PGFAIL];
const EVENTS: [u16; 6] = [
    stat::SWAP_IN,
    stat::SWAP_OUT,
    stat::MAJFLT,
    stat::MINFLT,
    stat::OOM_KILL,
    stat::ALLOC_STALL,
];

/// Returns the tags that a kernel sends which counts `events`, and those of huge pages.
fn tags(has_events: bool, has_hugetlb: bool) -> Result<KVec<u16>> {
    let info = Info {
        has_events,
        has_hugetlb,
        ..Info::now()
    };
    let mut buffer = KVec::<Stat>::with_capacity(stat::KINDS, GFP_KERNEL)?;
    let mut tags = KVec::with_capacity(stat::KINDS, GFP_KERNEL)?;

    collect(&mut buffer, &info, ByteOrder::Native);
    for stat in &buffer {
        tags.push(stat.tag, GFP_KERNEL)?;
    }
    Ok(tags)
}

#[kunit_tests(virtio_balloon_rs_stats)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_counted_is_left_out() -> Result {
        for (has_events, has_hugetlb) in [(true, true), (true, false), (false, false)] {
            let tags = tags(has_events, has_hugetlb)?;
            let has = |tag: &u16| tags.contains(tag);

            assert!(HUGETLB.iter().all(|tag| has(tag) == has_hugetlb));
            assert!(EVENTS.iter().all(|tag| has(tag) == has_events));
            let missing = match (has_events, has_hugetlb) {
                (true, true) => 0,
                (true, false) => HUGETLB.len(),
                _ => HUGETLB.len() + EVENTS.len(),
            };
            assert_eq!(tags.len(), stat::KINDS - missing);
        }
        Ok(())
    }
}
