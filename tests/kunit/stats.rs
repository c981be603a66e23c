// SPDX-License-Identifier: GPL-2.0

//! Statistics of kernels that do not count everything, and pressure notices.

#![cfg_attr(not(CONFIG_PM_SLEEP), expect(unused_imports))]

use crate::{
    device::timeouts,
    features::stats::{
        collect,
        new_buffer, //
    },
    kunit::{
        device::{
            eventually,
            statistic,
            STATS, //
        },
        host_requests::can_drop_caches, //
    },
    rust::{
        fs::caches::CacheDropper,
        mm::info::Info,
        virtio::{
            fake_device::{
                FakeDevice,
                Request,
                QUEUE_SIZE, //
            },
            ByteOrder,
            FeatureBit, //
        },
        virtio_balloon::{
            stat,
            F_PRESSURE,
            F_STATS_VQ, //
        }, //
    }, //
};

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::delay::fsleep, //
};

/// Calls all shrinkers, as the kernel does when it reclaims memory.
fn reclaim() -> Result {
    let mut result = Err(EBUSY);

    eventually(|| {
        let Some(dropping) = CacheDropper::begin() else {
            return Ok(false);
        };
        result = dropping.drop_caches(false, true);
        Ok(true)
    })?;
    result
}

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

    #[test]
    fn statistics_come_unasked_when_memory_is_reclaimed() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STATS_VQ, F_PRESSURE])?;
        let use_buffer = |request: &Request| {
            device.answer(STATS, request, 0)?;
            device.interrupt(STATS)
        };
        let (first, _) = statistic(&device, stat::MEMFREE)?;
        reclaim()?;
        let (second, _) = statistic(&device, stat::MEMFREE)?;

        // The driver has no further buffer, and gets one when the device has used the older one.
        reclaim()?;
        fsleep(timeouts::PRESSURE_NOTICES);
        assert!(device.next(STATS)?.is_none());
        use_buffer(&first)?;
        let (third, _) = statistic(&device, stat::MEMFREE)?;

        // That is no request. The device requests statistics with the last buffer.
        use_buffer(&second)?;
        fsleep(timeouts::PRESSURE_NOTICES);
        assert!(device.next(STATS)?.is_none());
        use_buffer(&third)?;
        statistic(&device, stat::MEMFREE)?;
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn a_request_keeps_the_system_awake_until_the_answer() -> Result {
        static IS_AWAKE: Atomic<bool> = Atomic::new(false);
        let features = [FeatureBit::VERSION_1, F_STATS_VQ];
        let device = FakeDevice::with_callback(&features, |device, queue| {
            if queue == STATS {
                IS_AWAKE.store(device.is_awake(), Relaxed);
            }
        })?;
        device.enable_wakeup()?;

        let (request, _) = statistic(&device, stat::MEMFREE)?;
        eventually(|| Ok(!device.is_awake()))?;
        device.answer(STATS, &request, 0)?;
        device.interrupt(STATS)?;
        statistic(&device, stat::MEMFREE)?;
        eventually(|| Ok(IS_AWAKE.load(Relaxed)))?;
        eventually(|| Ok(!device.is_awake()))
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn pressure_notices_continue_after_a_suspend() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STATS_VQ, F_PRESSURE])?;
        statistic(&device, stat::MEMFREE)?;
        device.freeze()?;
        reclaim()?;
        device.restore(QUEUE_SIZE)?;
        statistic(&device, stat::MEMFREE)?;
        fsleep(timeouts::PRESSURE_NOTICES);
        assert!(device.next(STATS)?.is_none());
        reclaim()?;
        statistic(&device, stat::MEMFREE)?;
        Ok(())
    }

    #[test]
    fn a_device_without_pressure_notices_gets_none() -> Result {
        if !can_drop_caches() {
            return Ok(());
        }
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_STATS_VQ])?;
        statistic(&device, stat::MEMFREE)?;
        reclaim()?;
        fsleep(timeouts::PRESSURE_NOTICES);
        assert!(device.next(STATS)?.is_none());

        // Without statistics there are no notices.
        drop(device);
        let device = FakeDevice::new(&[FeatureBit::VERSION_1, F_PRESSURE])?;
        assert!(!device.has_feature(F_PRESSURE));
        Ok(())
    }
}
