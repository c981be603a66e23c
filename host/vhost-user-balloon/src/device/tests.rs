// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::lease::{NewTarget, clock};
use super::statistics::SOON_TIMES;
use super::target::{REPORT_TIME, REST};
use super::*;
use crate::budget::BUDGET;
use crate::memory::discard::Pieces;
use crate::queues::virtqueue::MAX_BATCH;
use crate::testing::{GuestQueue, device, device_with, memory_file};
use balloon_control::{Handler, Request};
use balloon_wire::status::Status;
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_STOP_REASON_EXCLUDED, config};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use vhost_user_backend::{VhostUserBackend, VringT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

/// How long another thread may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_driver_may_read_any_part_of_the_configuration() {
    let device = device(&[Feature::Stats], true);
    device.acked_features(Feature::Stats.mask());
    lock(&device.state).config.stop_reason = 0x0102_0304;
    let all = device.get_config(0, 64);
    assert_eq!((all.len(), &all[24..]), (64, &[0; 40][..]));
    for start in 0..40_usize {
        for length in 0..24_usize {
            let part = device.get_config(start.try_into().unwrap(), length.try_into().unwrap());
            assert_eq!(part, all[start..start + length]);
        }
    }
}

/// A device with a guest of 16 MiB, whose driver has started at this index.
fn running(target: u64, next: u16) -> Device {
    running_with(memory_file(0).try_clone().unwrap(), target, next)
}

/// The same with this end of a channel.
fn running_with(end: impl Into<OwnedFd>, target: u64, next: u16) -> Device {
    let device = device_with(end, &[Feature::Stats], true);
    let target = u32::try_from(target / BALLOON_PAGE_SIZE).unwrap();
    device.set_target(target).unwrap();
    device.set_stats_interval(10).unwrap();
    device.acked_features(Feature::Stats.mask());
    let memory = GuestMemoryAtomic::new(GuestQueue::new().memory);
    device.update_memory(memory).unwrap();
    device.start(&mut lock(&device.work), next);
    report_late(&device);
    device
}

/// Makes the driver send statistics with this total.
fn report(device: &Device, total: u64) {
    let mut guest = GuestQueue::new();
    let (counters, messages) = Default::default();
    // The first buffer may be old, and is returned unread.
    for _ in 0..2 {
        guest.send(&[&[&5_u16.to_le_bytes()[..], &total.to_le_bytes()].concat()]);
        lock(&device.stats).serve(
            &mut guest.vring(),
            &guest.memory,
            &counters,
            &messages,
            Some(0),
            false,
        );
    }
}

/// Makes the driver send no statistics in time.
fn report_late(device: &Device) {
    lock(&device.times).started = Instant::now().checked_sub(REPORT_TIME);
}

fn asked(device: &Device) -> u64 {
    let config = device.get_config(0, 4);
    u64::from(u32::from_le_bytes(config.try_into().unwrap())) * BALLOON_PAGE_SIZE
}

#[test]
fn a_kept_target_leaves_the_floor() {
    let device = running(64 << 20, 7);
    assert_eq!(asked(&device), 15 << 20);
    assert_eq!(device.limit(), Some(15 << 20));
    let error = device.handle(Request::set((15 << 20) + 4096)).unwrap_err();
    assert!(error.to_string().contains("15728640"), "{error}");
    device.handle(Request::set(15 << 20)).unwrap();
}

#[test]
fn a_guest_does_not_wait_for_the_hosts_disk() {
    let (end, other) = UnixStream::pair().unwrap();
    let device = running_with(end, 8 << 20, 7);
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    (&other).read_exact(&mut [0]).unwrap();
    device.end_notice();
    thread::scope(|scope| {
        let _disk = lock(&device.file);
        scope.spawn(|| device.set_target(1024));
        (&other).read_exact(&mut [0]).unwrap();
        assert_eq!(asked(&device), 4 << 20);
        scope.spawn(|| device.inhibit("", Duration::from_secs(60)));
        let start = Instant::now();
        while device.inhibited().is_none() {
            assert!(start.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn a_target_that_was_not_kept_is_kept_when_it_is_set_again() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("later");
    let path = directory.join("state");
    let device = running(8 << 20, 7);
    *lock(&device.file) = Some(path.clone());
    device.set_target(1024).unwrap_err();
    fs::create_dir(directory).unwrap();
    device.set_target(1024).unwrap();
    assert_eq!(State::load(&path, 0).unwrap().config.target, 1024);
}

/// Whatever clients have set since the one before.
#[test]
fn each_release_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("state");
    let device = running(8 << 20, 7);
    *lock(&device.file) = Some(path.clone());
    let kept = || State::load(&path, 0).unwrap().config.target;
    for _ in 0..2 {
        device.set_target(0).unwrap();
        let new = NewTarget {
            release: Some(256),
            ..leased(1024, 60)
        };
        device.set_target(new).unwrap();
        device.release();
        assert_eq!(kept(), 1024);
        device.keep_release();
        assert_eq!(kept(), 768);
    }
}

#[test]
fn a_guest_that_boots_is_left_alone() {
    let device = running(8 << 20, 0);
    assert_eq!(asked(&device), 0);
    assert!(device.grace().is_some());
    // A client overrides the wait.
    device.set_target(2048).unwrap();
    assert_eq!(asked(&device), 8 << 20);

    let device = running(8 << 20, 0);
    lock(&device.times).grace_end = Some(Instant::now());
    assert_eq!(asked(&device), 8 << 20);
    // A driver that continues keeps its balloon.
    device.stop();
    lock(&device.state).config.actual = 1024;
    assert_eq!(asked(&device), 4 << 20);
    device.start(&mut lock(&device.work), 7);
    report_late(&device);
    assert_eq!(asked(&device), 8 << 20);
}

fn leased(pages: u32, seconds: u64) -> NewTarget {
    NewTarget {
        lease: Some(Duration::from_secs(seconds)),
        ..pages.into()
    }
}

#[test]
fn a_guest_that_boots_is_left_alone_when_a_lease_is_renewed() {
    let device = running(0, 7);
    device.set_target(leased(2048, 60)).unwrap();
    device.stop();
    device.start(&mut lock(&device.work), 0);
    report_late(&device);
    assert_eq!(asked(&device), 0);
    device.set_target(leased(2048, 60)).unwrap();
    assert_eq!(asked(&device), 0);
    device.set_target(leased(1024, 60)).unwrap();
    assert_eq!(asked(&device), 4 << 20);
}

#[test]
fn a_guest_is_notified_of_the_end_of_a_lease() {
    let device = running(0, 7);
    device.set_target(leased(2048, 60)).unwrap();
    device.end_lease(clock());
    assert_eq!((asked(&device), device.told.load(SeqCst)), (8 << 20, 2048));
    device.end_lease(clock() + Duration::from_secs(60));
    assert_eq!((asked(&device), device.told.load(SeqCst)), (0, 0));
    assert!(device.state().lapsed);
}

#[test]
fn a_driver_keeps_its_balloon_until_it_reports() {
    let device = running(8 << 20, 7);
    lock(&device.state).config.actual = 1024;
    device.stop();
    device.start(&mut lock(&device.work), 7);
    assert_eq!(asked(&device), 4 << 20);
    report_late(&device);
    assert_eq!(asked(&device), 8 << 20);
}

#[test]
fn a_driver_that_continues_keeps_its_size() {
    let device = device(&[Feature::Stats], true);
    for (continues, size) in [(1, 5), (0, 0)] {
        let body = [1_i32, continues].map(i32::to_ne_bytes);
        device.channel.set_vmm(body.as_flattened());
        device.acked_features(Feature::Stats.mask());
        device.set_config(4, &5_u32.to_le_bytes()).unwrap();
        // Its driver has sent a multiple of 65536 messages.
        device.start(&mut lock(&device.work), 0);
        assert_eq!(device.state().config.actual, size);
        device.stop();
    }
}

#[test]
fn a_driver_that_was_reset_before_this_worker_started_it_does_not_continue() {
    let device = device(&[Feature::Stats], true);
    let body = [1_i32; 2].map(i32::to_ne_bytes);
    device.channel.set_vmm(body.as_flattened());
    device.acked_features(Feature::Stats.mask());
    device.set_config(4, &5_u32.to_le_bytes()).unwrap();
    device.stop_vring(0).unwrap();
    device.start(&mut lock(&device.work), 0);
    assert_eq!(device.state().config.actual, 0);
}

/// The worker that is killed has stored the status, as the supervisor stores writes of the configuration space.
#[test]
fn a_status_is_known_to_the_next_worker() {
    const STATUS: [u8; 24] = [
        8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0,
    ];
    let fields = |device: &Device| {
        let fields = device.state().config;
        (fields.actual, fields.stop_reason)
    };
    let mut guest = GuestQueue::new();
    guest.send(&[&STATUS]);
    let file = memory_file(0);
    let worker = |continues: i32, next| {
        let device = device(&[Feature::Stats], true);
        lock(&device.work).balloon.keep(file.try_clone().unwrap());
        let body = [1, continues].map(i32::to_ne_bytes);
        device.channel.set_vmm(body.as_flattened());
        device.acked_features(Feature::PageSets.mask() | Feature::Status.mask());
        device
            .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
            .unwrap();
        device.start(&mut lock(&device.work), next);
        device
    };
    let first = worker(0, 0);
    first.serve_queue(0, &guest.vrings());
    assert_eq!(guest.used(), 1);
    assert_eq!(fields(&first), (5, VIRTIO_BALLOON_STOP_REASON_EXCLUDED));
    assert_eq!(fields(&worker(1, 1)), fields(&first));
    // The VM was stopped when the worker ended.
    assert_eq!(fields(&worker(0, 1)), fields(&first));
    // Another driver has another balloon.
    assert_eq!(fields(&worker(0, 0)), (0, 0));
    assert_eq!(fields(&worker(1, 1)), (0, 0));
}

/// A guest may read its target before the new worker serves its queues.
#[test]
fn a_status_is_known_before_the_queues_are_served() {
    let guest = GuestQueue::new();
    let file = memory_file(0);
    let worker = || {
        let device = device(&[Feature::Stats], true);
        lock(&device.work).balloon.keep(file.try_clone().unwrap());
        device.set_target(2048).unwrap();
        let body = [1_i32; 2].map(i32::to_ne_bytes);
        device.channel.set_vmm(body.as_flattened());
        device.acked_features(Feature::PageSets.mask() | Feature::Status.mask());
        device
            .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
            .unwrap();
        device
    };
    let status = Status {
        actual: 2048,
        stop_reason: 0,
    };
    lock(&worker().work).balloon.write_status_down(status);
    assert_eq!(asked(&worker()), 8 << 20);
}

#[test]
fn a_balloon_is_not_at_rest_before_the_guest_was_asked() {
    // A new worker continues with a driver whose balloon is changing. The size arrives later.
    let device = running(8 << 20, 7);
    assert!(!device.is_at_rest());
    device.set_config(4, &1024_u32.to_le_bytes()).unwrap();
    assert!(!device.is_at_rest());
    assert_eq!(asked(&device), 8 << 20);
    device.set_config(4, &2048_u32.to_le_bytes()).unwrap();
    assert!(device.is_at_rest());
    device.disconnect();
    assert!(!device.is_at_rest());
}

#[test]
fn a_balloon_that_cannot_grow_is_at_rest() {
    let device = running(8 << 20, 7);
    assert_eq!(asked(&device), 8 << 20);
    assert!(!device.is_at_rest());
    lock(&device.times).moved = Instant::now().checked_sub(2 * REST);
    assert!(device.is_at_rest());
    device.set_config(4, &7_u32.to_le_bytes()).unwrap();
    assert!(!device.is_at_rest());
    device.set_config(4, &2048_u32.to_le_bytes()).unwrap();
    assert!(device.is_at_rest());
}

#[test]
fn the_shortest_interval_of_statistics_counts() {
    let device = running(0, 7);
    let at = Duration::from_millis;
    for (own, wished, shortest) in [
        (10, None, Some(10_000)),
        (10, Some(250), Some(250)),
        (0, Some(250), Some(250)),
        (1, Some(5000), Some(1000)),
        (0, None, None),
    ] {
        device.set_stats_interval(own).unwrap();
        device.set_wished_interval(wished.map(at));
        assert_eq!(device.interval(), shortest.map(at));
    }
}

#[test]
fn a_driver_that_sends_no_statistics_gets_the_target() {
    let device = running(0, 7);
    lock(&device.times).started = Some(Instant::now());
    device.set_target(1024).unwrap();
    assert_eq!((asked(&device), device.told.load(SeqCst)), (0, 0));
    report_late(&device);
    let event = TIMER.try_into().unwrap();
    device.handle_event(event, EventSet::IN, &[], 0).unwrap();
    assert_eq!(device.told.load(SeqCst), 1024);
}

#[test]
fn memory_that_was_plugged_counts_before_the_guest_has_it() {
    let device = running(0, 7);
    report(&device, 4 << 20);
    assert_eq!(device.limit(), Some(3 << 20));
    let set = |bytes| device.handle(Request::set(bytes));
    assert!(set(8 << 20).is_err());
    device
        .update_memory(GuestMemoryAtomic::new(GuestQueue::new().memory))
        .unwrap();
    set(8 << 20).unwrap();
    assert_eq!(asked(&device), 3 << 20);
    for _ in 0..SOON_TIMES {
        device.asked_soon();
    }
    assert!(set(8 << 20).is_err());
}

#[test]
fn a_guest_that_reboots_starts_from_nothing() {
    let device = running(8 << 20, 7);
    lock(&device.state).config.actual = 1024;
    device.stop();
    device.acked_features(Feature::Stats.mask());
    thread::scope(|scope| {
        let target = scope.spawn(|| asked(&device));
        let excluded = VIRTIO_BALLOON_STOP_REASON_EXCLUDED.to_le_bytes();
        let place = u32::try_from(config::STOP_REASON).unwrap();
        let device = &device;
        scope.spawn(move || device.set_config(place, &excluded));
        // Statistics come first, and the target waits.
        thread::sleep(Duration::from_millis(50));
        device.start(&mut lock(&device.work), 0);
        assert_eq!(target.join().unwrap(), 0);
    });
    let fields = device.state().config;
    assert_eq!(
        (fields.actual, fields.stop_reason),
        (0, VIRTIO_BALLOON_STOP_REASON_EXCLUDED)
    );
}

/// A client that asks before the first message would charge the guest with too little.
#[test]
fn a_new_driver_has_an_empty_balloon_at_once() {
    let device = running(8 << 20, 7);
    let pages = 0x100..0x200;
    lock(&device.work)
        .balloon
        .inflate(&[pages], &mut Pieces::default());
    device.held.store(1 << 20, SeqCst);
    device.stop();
    device.start(&mut lock(&device.work), 7);
    assert_eq!(device.held(), 1 << 20);
    device.stop();
    device.start(&mut lock(&device.work), 0);
    assert_eq!(device.held(), 0);
}

#[test]
fn a_busy_guest_leaves_time_to_others() {
    let device = running(0, 0);
    let mut guest = GuestQueue::new();
    device
        .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
        .unwrap();
    for _ in 0..MAX_BATCH + 1 {
        guest.send(&[&[0, 1, 0, 0]]);
    }
    let before = Instant::now().checked_sub(2 * BUDGET);
    for (paused, pauses) in [(before, true), (Some(Instant::now() + BUDGET), false)] {
        lock(&device.work).paused = paused;
        // The whole batch is done in time, and there is more.
        device.serve_queue(0, &guest.vrings());
        assert_eq!(lock(&device.work).paused != paused, pauses);
        for _ in 0..MAX_BATCH {
            guest.send(&[&[0, 1, 0, 0]]);
        }
    }
}

#[test]
fn a_client_does_not_wait_for_a_guest_that_is_gone() {
    let device = running(0, 7);
    device.connected.store(true, SeqCst);
    thread::scope(|scope| {
        let start = Instant::now();
        let stats = scope.spawn(|| device.fresh_stats(Duration::from_secs(600)));
        // It waits first.
        thread::sleep(Duration::from_millis(50));
        device.disconnect();
        assert!(stats.join().unwrap().is_none());
        assert!(start.elapsed() < Duration::from_secs(300));
    });
}

#[test]
fn a_front_end_does_not_wait_for_a_look_at_processes() {
    let device = running(0, 7);
    let guest = GuestQueue::new();
    let vrings = guest.vrings();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        // Reading the state of a process hangs in the kernel.
        let look = lock(&device.watch);
        scope.spawn(|| device.serve_queue(0, &vrings));
        // It looks.
        thread::sleep(Duration::from_millis(50));
        scope.spawn(|| {
            drop(vrings[0].get_mut());
            device
                .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
                .unwrap();
            done.send(()).unwrap();
        });
        let result = is_done.recv_timeout(PATIENCE);
        drop(look);
        result.unwrap();
    });
}

#[test]
fn the_end_of_the_grace_is_not_missed() {
    let (end, mut other) = UnixStream::pair().unwrap();
    let device = running_with(end, 8 << 20, 0);
    other.read_exact(&mut [0]).unwrap();
    other.set_nonblocking(true).unwrap();
    let handle = || device.handle_event(GRACE.try_into().unwrap(), EventSet::IN, &[], 0);
    device.end_notice();
    // That of the previous driver.
    handle().unwrap();
    assert!(device.grace().is_some() && other.read(&mut [0]).is_err());

    lock(&device.times).grace_end = Some(Instant::now());
    // The guest reads for another reason, and the front end reads the whole space.
    device.get_config(8, 4);
    handle().unwrap();
    other.read_exact(&mut [0]).unwrap();
    assert_eq!(asked(&device), 8 << 20);
}

#[test]
fn statistics_that_do_not_come_hold_a_target_for_a_limited_time() {
    let device = running(0, 0);
    // Without an earlier target there is no boot grace.
    assert!(device.grace().is_none() && device.grace.is_set());
    device.grace.once(Duration::ZERO);

    // The timer expires a moment too early.
    lock(&device.times).started = Some(Instant::now());
    let handle = || device.handle_event(GRACE.try_into().unwrap(), EventSet::IN, &[], 0);
    handle().unwrap();
    assert!(device.grace.is_set());
    device.handle(Request::set(8 << 20)).unwrap();
    assert_eq!(asked(&device), 0);

    report_late(&device);
    handle().unwrap();
    assert_eq!(asked(&device), 8 << 20);
}

#[test]
fn a_sample_before_the_first_read_of_the_target_is_repeated() {
    let device = running(8 << 20, 0);
    let mut guest = GuestQueue::new();
    let (counters, messages) = Default::default();
    let serve = |guest: &GuestQueue, size| {
        let mut vring = guest.vring();
        lock(&device.stats).serve(&mut vring, &guest.memory, &counters, &messages, size, false);
    };
    // The first buffer may be old, and is returned unread. The balloon is not known to be at rest.
    for _ in 0..2 {
        guest.send(&[&[&5_u16.to_le_bytes()[..], &(16_u64 << 20).to_le_bytes()].concat()]);
        serve(&guest, None);
    }
    assert_eq!((guest.used(), lock(&device.stats).total()), (1, None));

    device.get_config(0, 4);
    serve(&guest, Some(0));
    assert_eq!(guest.used(), 2);
}

#[test]
fn a_client_that_sets_targets_without_end_does_not_flood_the_guest() {
    let (end, mut other) = UnixStream::pair().unwrap();
    let device = running_with(end, 8 << 20, 0);
    other.set_nonblocking(true).unwrap();
    let mut notifications = || {
        let mut bytes = Vec::new();
        // All are read, and then there are no more for now.
        other.read_to_end(&mut bytes).unwrap_err();
        bytes.len()
    };
    let end_of_interval = || device.handle_event(NOTICE.try_into().unwrap(), EventSet::IN, &[], 0);
    assert_eq!(notifications(), 1);
    for target in 0..100 {
        device.set_target(target).unwrap();
    }
    device.command(Hints::restart);
    assert_eq!(notifications(), 0);
    // The guest gets the last target.
    end_of_interval().unwrap();
    assert_eq!(notifications(), 1);
    assert_eq!(asked(&device), 99 * BALLOON_PAGE_SIZE);
    end_of_interval().unwrap();
    assert_eq!(notifications(), 0);
    device.set_target(0).unwrap();
    assert_eq!(notifications(), 1);
}

/// A driver that does not notify the device may already use a page of its balloon. So may a guest
/// whose queues are stopped.
#[test]
fn memory_that_others_have_read_is_given_back() {
    const PAGE: u64 = 0x100;
    for (features, given_back) in [(&[][..], 0), (&[Feature::MustTellHost], 8)] {
        let mut device = device(features, false);
        device.settings.granularity = Granularity::Bytes(4096);
        device.settings.allowed = vec![Hazard::Unseen];
        device.acked_features(device.settings.features);
        let guest = GuestQueue::new();
        device
            .update_memory(GuestMemoryAtomic::new(guest.memory.clone()))
            .unwrap();
        device.start(&mut lock(&device.work), 0);
        let pages = PAGE..PAGE + 1;
        lock(&device.work)
            .balloon
            .inflate(&[pages], &mut Pieces::default());
        // The VMM stops the queues again before the search.
        device.stop();
        device.start(&mut lock(&device.work), 7);
        device.stop();
        let blocks = || guest.file().metadata().unwrap().blocks();
        let before = blocks();
        // The page after it is not in the balloon.
        for page in [PAGE, PAGE + 1] {
            let place = GuestAddress(page << 12);
            assert_eq!(guest.memory.read_obj::<u8>(place).unwrap(), 0);
        }
        let handle = || device.handle_event(SWEEP.try_into().unwrap(), EventSet::IN, &[], 0);
        handle().unwrap();
        assert_eq!(blocks(), before + 16, "the queues are stopped");
        device.inhibit("", Duration::from_secs(60)).unwrap();
        device.start(&mut lock(&device.work), 7);
        handle().unwrap();
        assert_eq!(blocks(), before + 16, "it is inhibited");
        device.resume(None).unwrap();
        handle().unwrap();
        assert_eq!(blocks(), before + 16 - given_back, "{features:?}");

        // The next driver has an empty balloon.
        guest
            .memory
            .read_obj::<u8>(GuestAddress(PAGE << 12))
            .unwrap();
        device.start(&mut lock(&device.work), 7);
        device.start(&mut lock(&device.work), 0);
        handle().unwrap();
        assert_eq!(blocks(), before + 16, "{features:?}");
    }
}

#[test]
fn nothing_of_a_guest_outlives_its_vmm() {
    let device = running(8 << 20, 7);
    device.set_config(0, &[0xff; 24]).unwrap();
    assert!(device.answered().is_some() && device.state().config.actual > 0);
    device.disconnect();
    let expected = Fields {
        target: 2048,
        ..Fields::default()
    };
    assert_eq!(device.state().config, expected);
    assert_eq!((device.answered(), device.guest_memory()), (None, None));
    assert!(device.stats().is_none());
}

#[test]
fn each_read_of_the_configuration_space_has_an_answer() {
    let device = device(&[Feature::Stats], true);
    for length in [1, 2, 4, 8, 16, 24, 32] {
        assert_eq!(device.get_config(0, length).len(), length as usize);
    }
    assert_eq!(device.get_config(u32::MAX, 4), [0; 4]);
}

#[test]
fn a_granule_is_told_without_memory() {
    let device = device(&[], true);
    assert_eq!(device.get_config(16, 4), 4096_u32.to_le_bytes());
}
