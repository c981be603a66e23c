// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front ends other than QEMU: the messages that the generic vhost-user devices of Cloud Hypervisor (August 2026) and
//! crosvm (August 2026) send, in their order. Both read the configuration space as their guest does, field by field.

use balloon_wire::{VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_STATS_VQ};

use super::supervision::{log, start_logged, wait_for_line};
use super::*;

/// The features that belong to a type of device.
const OF_DEVICE: u64 = 0x00ff_ffff | (0xfffc << 48);

/// Features of each front end's own.
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A generic front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It passes no features of the device, and sends the channel for changes after the queues.
    CloudHypervisor,
    /// It passes them, and sends the channel first.
    Crosvm,
}
use Kind::{CloudHypervisor, Crosvm};

/// A front end with its guest.
struct FrontEnd {
    kind: Kind,
    vmm: Vmm,
    /// The daemon's end of the channel for changes.
    theirs: UnixStream,
    features: u64,
    /// The events of the deflate queue, which the guest does not use.
    deflate: [EventFd; 2],
}

impl FrontEnd {
    /// Makes the device, before the guest starts.
    fn connect(kind: Kind, directory: &Path) -> Self {
        let socket = UnixStream::connect(directory.join("socket")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut front = Frontend::from_stream(socket, QUEUES);
        front.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let passed = match kind {
            CloudHypervisor => VERSION_1 | protocol,
            Crosvm => VERSION_1 | protocol | OF_DEVICE,
        };
        let features = front.get_features().unwrap() & passed;
        assert_eq!(features & (VERSION_1 | protocol), VERSION_1 | protocol);
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::BACKEND_REQ;
        let offered = front.get_protocol_features().unwrap();
        let protocol_features = offered & wanted;
        // Neither waits for an acknowledgement, keeps buffers in flight, or asks for the device's state.
        assert!(!protocol_features.intersects(
            VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::DEVICE_STATE
        ));
        front.set_protocol_features(protocol_features).unwrap();
        let (changes, theirs) = UnixStream::pair().unwrap();
        changes.set_read_timeout(Some(PATIENCE)).unwrap();
        if kind == Crosvm {
            front.set_backend_request_fd(&theirs).unwrap();
        }
        assert!(front.get_queue_num().unwrap() >= 2);
        Self {
            kind,
            vmm: Vmm::new(front, changes),
            theirs,
            features,
            deflate: [(); 2].map(|()| EventFd::new(0).unwrap()),
        }
    }

    /// The guest's driver has accepted features, and set `DRIVER_OK`. Each queue begins where the driver is.
    fn activate(&mut self, base: u16) {
        let front = &mut self.vmm.front;
        front.set_features(self.features).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: self.vmm.memory.as_raw_fd(),
        };
        front.set_mem_table(&[region]).unwrap();
        let [kick, call] = &self.deflate;
        let queues = [
            (0, base, DESCRIPTORS, &self.vmm.kick, &self.vmm.call),
            (1, 0, REQUESTS, kick, call),
        ];
        match self.kind {
            Crosvm => {
                for (number, base, rings, kick, call) in queues {
                    start_queue(front, number, base, rings, kick, call);
                }
            }
            CloudHypervisor => {
                for (number, ..) in queues {
                    front.set_vring_num(number, 16).unwrap();
                }
                for (number, base, rings, kick, call) in queues {
                    place_queue(front, number, base, rings, kick, call);
                }
                self.enable(true);
                let front = &mut self.vmm.front;
                front.set_backend_request_fd(&self.theirs).unwrap();
            }
        }
    }

    fn enable(&mut self, enabled: bool) {
        for number in 0..2 {
            self.vmm.front.set_vring_enable(number, enabled).unwrap();
        }
    }

    /// The guest resets the device: the front end stops its queues, and sends no features.
    fn reset(&mut self) {
        for number in 0..2 {
            self.vmm.front.set_vring_enable(number, false).unwrap();
            self.vmm.front.get_vring_base(number).unwrap();
        }
        self.vmm.store(AVAIL + 2, &[0, 0]);
        self.vmm.store(USED + 2, &[0, 0]);
        self.vmm.sent = 0;
    }

    /// Reads as many bytes as the guest does. Cloud Hypervisor ends if that fails.
    fn read(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let flags = match self.kind {
            CloudHypervisor => VhostUserConfigFlags::empty(),
            Crosvm => VhostUserConfigFlags::WRITABLE,
        };
        let buffer = vec![0; size.try_into().unwrap()];
        let answer = self.vmm.front.get_config(offset, size, flags, &buffer);
        answer.unwrap().1
    }

    /// Closes the connection. Returns the guest's memory, and the number of its messages.
    fn close(self) -> (File, u16) {
        (self.vmm.memory, self.vmm.sent)
    }

    fn write(&mut self, offset: u32, bytes: &[u8]) {
        let flags = match self.kind {
            CloudHypervisor => VhostUserConfigFlags::WRITABLE,
            Crosvm => VhostUserConfigFlags::empty(),
        };
        self.vmm.front.set_config(offset, flags, bytes).unwrap();
    }
}

/// A daemon, a front end, and a guest with page 0x100 in the balloon.
fn begin(kind: Kind, directory: &Path) -> (Running, FrontEnd) {
    // The guest sends no statistics, for which the daemon waits five seconds.
    let daemon = start_logged(directory, &["--stats-interval", "1"]);
    let mut front_end = FrontEnd::connect(kind, directory);
    front_end.activate(0);
    front_end.vmm.inflate(0x100);
    assert_eq!(front_end.vmm.byte(0x100 << 12), 0);
    (daemon, front_end)
}

/// Runs a test with each front end. The daemon logs no error.
fn each(test: impl Fn(&Path, &mut FrontEnd)) {
    for kind in [CloudHypervisor, Crosvm] {
        let directory = tempfile::tempdir().unwrap();
        let (daemon, mut front_end) = begin(kind, directory.path());
        test(directory.path(), &mut front_end);
        drop(front_end);
        daemon.end();
        let log = log(directory.path());
        assert!(!log.contains("ERROR"), "{log}");
    }
}

#[test]
fn other_front_ends_read_fields_and_are_notified() {
    each(|directory, front_end| {
        set(directory, 8 << 12);
        // The first may have come when the driver started.
        while front_end.read(0, 4) != 8_u32.to_le_bytes() {
            front_end.vmm.change();
        }
        assert_eq!(front_end.read(0, 1), [8]);
        assert_eq!(front_end.read(2, 2), [0; 2]);
        assert_eq!(front_end.read(0, 8)[4..], [0; 4]);
        // A guest may read anything.
        assert_eq!(front_end.read(0xffc, 4), [0; 4]);
        front_end.write(0xffc, &[1; 4]);
        front_end.write(4, &1_u32.to_le_bytes());
        wait_for("the balloon's size", || info(directory).size == 1 << 12);
        assert_eq!(info(directory).target, 8 << 12);
    });
}

#[test]
fn reads_before_a_driver_end_no_front_end() {
    for kind in [CloudHypervisor, Crosvm] {
        let directory = tempfile::tempdir().unwrap();
        let daemon = start_logged(directory.path(), &["--extensions"]);
        let mut front_end = FrontEnd::connect(kind, directory.path());
        for size in [1, 2, 4, 8] {
            assert_eq!(front_end.read(0, size), vec![0; size.try_into().unwrap()]);
        }
        front_end.activate(0);
        front_end.vmm.inflate(0x100);
        drop(front_end);
        daemon.end();
        let log = log(directory.path());
        assert!(!log.contains("ERROR"), "{log}");
    }
}

#[test]
fn features_of_the_device_pass_through_one_front_end_only() {
    let of_device = [
        VIRTIO_BALLOON_F_STATS_VQ,
        VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_PAGE_SETS,
    ];
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    for (kind, expected) in [(CloudHypervisor, false), (Crosvm, true)] {
        let front_end = FrontEnd::connect(kind, directory);
        let has = of_device.map(|bit| front_end.features & (1 << bit) != 0);
        assert_eq!(has, [expected; 3], "{kind:?}");
        drop(front_end);
        wait_for("the end of the VMM", || !info(directory).guest.connected);
    }
    daemon.end();
}

#[test]
fn a_reset_by_other_front_ends_empties_the_balloon() {
    each(|directory, front_end| {
        front_end.reset();
        wait_for("the reset", || !info(directory).guest.driver);
        front_end.vmm.store(0x100 << 12, &[7]);
        front_end.activate(0);
        front_end.vmm.inflate(0x100);
        assert_eq!(front_end.vmm.byte(0x100 << 12), 0);
        assert!(info(directory).counters.refused.is_empty());
        set(directory, 8 << 12);
        while front_end.read(0, 4) != 8_u32.to_le_bytes() {
            front_end.vmm.change();
        }
    });
}

#[test]
fn a_pause_loses_no_message() {
    each(|directory, front_end| {
        front_end.enable(false);
        // The guest has notified the device just before it was paused.
        front_end.vmm.offer(&0x101_u32.to_le_bytes());
        front_end.enable(true);
        front_end.vmm.wait_used();
        assert_eq!(front_end.vmm.byte(0x101 << 12), 0);
        front_end.vmm.store(0x100 << 12, &[7]);
        front_end.vmm.inflate(0x100);
        assert_eq!(front_end.vmm.byte(0x100 << 12), 7, "the balloon is known");
        assert!(info(directory).guest.driver);
    });
}

#[test]
fn another_process_serves_other_front_ends() {
    for kind in [CloudHypervisor, Crosvm] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let (daemon, mut front_end) = begin(kind, directory);
        kill(daemon.worker(), Signal::SIGKILL).unwrap();
        wait_for("another worker", || {
            let now = call(directory, &Request::Info {}).and_then(|answer| answer.parse::<Info>());
            now.is_ok_and(|now| now.counters.messages.inflate == 0 && now.guest.driver)
        });
        assert_eq!(front_end.read(0, 4), [0; 4]);
        front_end.vmm.inflate(0x101);
        assert_eq!(front_end.vmm.byte(0x101 << 12), 0);
        daemon.end();
    }
}

#[test]
fn other_front_ends_connect_again() {
    for kind in [CloudHypervisor, Crosvm] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let (daemon, front_end) = begin(kind, directory);
        let (memory, sent) = front_end.close();
        wait_for("the end of the VMM", || !info(directory).guest.connected);
        // The guest continues, and each queue begins with the next message.
        let mut front_end = FrontEnd::connect(kind, directory);
        front_end.vmm.memory = memory;
        front_end.vmm.sent = sent;
        front_end.activate(sent);
        front_end.vmm.inflate(0x101);
        assert_eq!(front_end.vmm.byte(0x101 << 12), 0);
        daemon.end();
    }
}

#[test]
fn queues_of_crosvms_default_size_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut front_end = FrontEnd::connect(Crosvm, directory);
    front_end.vmm.front.set_vring_num(0, 32768).unwrap();
    wait_for_line(directory, "crosvm's with max-queue-size=256");
    assert_eq!(front_end.read(0, 4), [0; 4]);
    drop(front_end);
    daemon.end();
}
