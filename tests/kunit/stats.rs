// SPDX-License-Identifier: GPL-2.0

//! Statistics of kernels that do not count everything.

use crate::{
    features::stats::{
        collect,
        new_buffer, //
    },
    rust::{
        mm::info::Info,
        virtio::ByteOrder,
        virtio_balloon::stat, //
    }, //
};

use kernel::prelude::*;

/// Returns the tags that a kernel with the counts in `info` sends.
fn tags(info: &Info) -> Result<KVec<u16>> {
    let mut buffer = new_buffer()?;
    let mut tags = KVec::new();

    collect(&mut buffer, info, ByteOrder::Native);
    for stat in &buffer {
        tags.push(stat.tag, GFP_KERNEL)?;
    }
    Ok(tags)
}

/// The counts of a kernel that counts everything.
fn everything() -> Info {
    Info {
        swapped_in: Some(1),
        swapped_out: Some(2),
        major_faults: Some(3),
        faults: Some(4),
        hugetlb_allocations: Some(5),
        hugetlb_failures: Some(6),
        oom_kills: Some(7),
        allocation_stalls: Some(8),
        ..Info::now()
    }
}

#[kunit_tests(virtio_balloon_rs_stats)]
mod tests {
    use super::*;

    #[test]
    fn each_statistic_of_the_kernels_header_is_sent_once() -> Result {
        let tags = tags(&everything())?;

        for tag in 0..stat::END {
            assert_eq!(tags.iter().filter(|&&this| this == tag).count(), 1);
        }
        Ok(())
    }

    #[test]
    fn statistics_that_are_not_counted_are_omitted() -> Result {
        let all = tags(&everything())?;
        let without = |info: Info, missing: &[u16]| -> Result<bool> {
            let rest = tags(&info)?;

            Ok(rest.len() == all.len() - missing.len()
                && missing.iter().all(|tag| !rest.contains(tag)))
        };
        let no_hugetlb = Info {
            hugetlb_allocations: None,
            hugetlb_failures: None,
            ..everything()
        };
        let no_events = Info {
            swapped_in: None,
            swapped_out: None,
            major_faults: None,
            faults: None,
            oom_kills: None,
            allocation_stalls: None,
            ..no_hugetlb
        };

        assert!(without(
            no_hugetlb,
            &[stat::HTLB_PGALLOC, stat::HTLB_PGFAIL]
        )?);
        assert!(without(
            no_events,
            &[
                stat::HTLB_PGALLOC,
                stat::HTLB_PGFAIL,
                stat::SWAP_IN,
                stat::SWAP_OUT,
                stat::MAJFLT,
                stat::MINFLT,
                stat::OOM_KILL,
                stat::ALLOC_STALL,
            ]
        )?);
        Ok(())
    }
}
