// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Subscriptions to the daemon's events.

use std::io::{BufRead, BufReader};

use balloon_control::{Event, Events, News, Stat, Stats};
use balloon_wire::{VIRTIO_BALLOON_F_PRESSURE, VIRTIO_BALLOON_F_STATS_VQ};

use super::supervision::{start_logged, wait_for_line};
use super::*;

/// The statistics queue in the guest's memory, and its number.
const STATS: u64 = REQUESTS;
const STATS_NUMBER: usize = 2;

pub(super) fn subscribe(directory: &Path) -> Events {
    subscribe_with(directory, None)
}

/// The same, with an interval of statistics.
fn subscribe_with(directory: &Path, statistics: Option<Duration>) -> Events {
    let client = Client::connect(&directory.join("control")).unwrap();
    client.subscribe(statistics).unwrap()
}

/// Reads events until one has this state. Events without a change do not count as one.
pub(super) fn wait_for_state(what: &str, events: &mut Events, is: impl Fn(&Info) -> bool) {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < PATIENCE, "no event for {what}");
        match events.next(PATIENCE).unwrap() {
            Some(News::Info(answer)) if is(&answer.parse().unwrap()) => return,
            _ => {}
        }
    }
}

#[test]
fn every_change_is_an_event() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    let mut events = subscribe(directory);
    wait_for_state("the present", &mut events, |info| !info.guest.connected);
    let mut vmm = Vmm::connect(directory);
    wait_for_state("the VMM", &mut events, |info| info.guest.connected);
    vmm.start(0);
    wait_for_state("the driver", &mut events, |info| info.guest.driver);
    set(directory, 8 << 12);
    wait_for_state("the target", &mut events, |info| info.target == 8 << 12);
    vmm.change();
    vmm.inflate(0x100);
    wait_for_state("the page", &mut events, |info| info.held == 1 << 12);
    let mut config = vmm.config();
    config[4..8].copy_from_slice(&1_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for_state("the size", &mut events, |info| info.size == 1 << 12);
    let mut client = Client::connect(&directory.join("control")).unwrap();
    let inhibit = Request::Inhibit {
        seconds: 60,
        owner: None,
    };
    client.call(&inhibit).unwrap();
    wait_for_state("the inhibit", &mut events, |info| info.inhibited.is_some());
    client.call(&Request::Resume { owner: None }).unwrap();
    wait_for_state("its end", &mut events, |info| info.inhibited.is_none());
    vmm.front.get_vring_base(0).unwrap();
    wait_for_state("no driver", &mut events, |info| !info.guest.driver);
    drop(vmm);
    wait_for_state("no VMM", &mut events, |info| !info.guest.connected);
    daemon.end();
    while events.next(PATIENCE).is_ok() {}
}

/// A guest with statistics.
struct Reporting {
    vmm: Vmm,
    kick: EventFd,
}

impl Reporting {
    fn start(directory: &Path) -> Self {
        Self::start_with(directory, 0)
    }

    /// With other features as well.
    fn start_with(directory: &Path, features: u64) -> Self {
        let mut vmm = Vmm::connect_with(directory, (1 << VIRTIO_BALLOON_F_STATS_VQ) | features);
        vmm.start(0);
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        start_queue(&mut vmm.front, STATS_NUMBER, 0, STATS, &kick, &call);
        let free_memory = [&4_u16.to_le_bytes()[..], &(7_u64 << 20).to_le_bytes()].concat();
        vmm.store(BUFFERS, &free_memory);
        vmm.store(STATS, &BUFFERS.to_le_bytes());
        vmm.store(STATS + 8, &10_u32.to_le_bytes());
        Self { vmm, kick }
    }

    /// Sends this many buffers in all.
    fn offer(&self, count: u16) {
        let place = STATS + AVAIL - DESCRIPTORS + 2;
        self.vmm.store(place, &count.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// How many of them the device has returned, which requests the next one.
    fn used(&self) -> u16 {
        let mut used = [0; 2];
        let place = STATS + USED - DESCRIPTORS + 2;
        self.vmm.memory.read_exact_at(&mut used, place).unwrap();
        u16::from_le_bytes(used)
    }
}

#[test]
fn a_subscriber_gets_statistics_at_its_interval() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--stats-interval", "0"]);
    let guest = Reporting::start(directory);
    let mut events = subscribe_with(directory, Some(Duration::from_millis(50)));
    let mut count = 0;
    while count < 10 {
        count += 1;
        guest.offer(count);
        wait_for("a request", || guest.used() == count);
    }
    let mut sequence = 0;
    while sequence == 0 {
        if let Some(News::Stats(answer)) = events.next(PATIENCE).unwrap() {
            let stats: Stats = answer.parse().unwrap();
            assert!(stats.requested >= 1000 * stats.age);
            sequence = stats.sequence;
        }
    }
    // The daemon's own interval is none.
    drop(events);
    let start = Instant::now();
    loop {
        count += 1;
        guest.offer(count);
        thread::sleep(Duration::from_millis(500));
        if guest.used() < count {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the guest is still asked");
    }
    daemon.end();
}

#[test]
fn statistics_are_events() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    let mut events = subscribe(directory);
    let guest = Reporting::start(directory);
    // The first buffer may be old, and is returned unread.
    guest.offer(1);
    wait_for("the first buffer", || guest.used() == 1);
    guest.offer(2);
    let start = Instant::now();
    let stats: Stats = loop {
        assert!(start.elapsed() < PATIENCE, "no event for the statistics");
        if let Some(News::Stats(answer)) = events.next(PATIENCE).unwrap() {
            break answer.parse().unwrap();
        }
    };
    assert_eq!(stats.values[&Stat::FreeMemory], 7 << 20);
    daemon.end();
}

#[test]
fn a_notice_lowers_the_target() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions", "--stats-interval", "0"]);
    let guest = Reporting::start_with(directory, 1 << VIRTIO_BALLOON_F_PRESSURE);
    // The first buffer may be old, and is returned. The device keeps the second one.
    guest.offer(1);
    wait_for("the first buffer", || guest.used() == 1);
    guest.offer(2);
    let set = Request::Set {
        bytes: 8 << 12,
        expected: None,
        lease: Some(60_000),
        fallback: None,
        owner: None,
        release: Some(3 << 12),
    };
    call(directory, &set).unwrap();
    let target = || {
        let info = info(directory);
        (info.target, info.release, info.released)
    };
    assert_eq!(target(), (8 << 12, Some(3 << 12), 0));
    let mut events = subscribe(directory);
    guest.offer(3);
    wait_for_state("a smaller target", &mut events, |info| {
        info.target == 5 << 12
    });
    guest.offer(4);
    wait_for("the next notice", || guest.used() == 3);
    assert_eq!(target(), (5 << 12, Some(0), 3 << 12));
    wait_for("the state file", || {
        let text = fs::read_to_string(directory.join("state")).unwrap();
        text.contains("\"target\":5,")
    });
    daemon.end();
}

/// A subscriber that does not read delays neither the VMM nor other clients.
#[test]
fn a_subscriber_that_does_not_read_is_disconnected_with_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut silent = UnixStream::connect(directory.join("control")).unwrap();
    silent.write_all(b"{\"command\":\"subscribe\"}\n").unwrap();
    let mut vmm = Vmm::connect(directory);
    vmm.start(0);
    let mut config = vmm.config();
    let start = Instant::now();
    let line = "a client of the control socket is disconnected: it has read nothing for 5s";
    for size in 1_u32.. {
        config[4..8].copy_from_slice(&size.to_le_bytes());
        vmm.write_config(&config);
        assert!(start.elapsed() < PATIENCE, "the client is still connected");
        if supervision::log(directory).contains(line) {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    wait_for_line(directory, line);
    // What was sent is still there, and the last line may not be whole.
    let lines: Vec<_> = BufReader::new(silent)
        .lines()
        .collect::<Result<_, _>>()
        .unwrap();
    for line in &lines[1..lines.len() - 1] {
        serde_json::from_str::<Event>(line).unwrap();
    }
    daemon.end();
}
