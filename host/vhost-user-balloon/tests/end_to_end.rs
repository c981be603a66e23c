// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon with a front end on its real socket.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use std::{env, thread};

use balloon_control::{
    Answer, Begun, Client, ClientError, Counters, ErrorKind, Info, Progress, Ranges, Request,
    RequestStatus,
};
use balloon_wire::{
    VIRTIO_BALLOON_F_HOST_REQUESTS, VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_SETS,
    VIRTIO_BALLOON_F_STATUS,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

#[path = "end_to_end/conventions.rs"]
mod conventions;
#[path = "end_to_end/events.rs"]
mod events;
#[path = "end_to_end/front_ends.rs"]
mod front_ends;
#[path = "end_to_end/granules.rs"]
mod granules;
#[path = "end_to_end/optional.rs"]
mod optional;
#[path = "end_to_end/out_of_memory.rs"]
mod out_of_memory;
#[path = "end_to_end/pinned.rs"]
mod pinned;
#[path = "end_to_end/requests.rs"]
mod requests;
#[path = "end_to_end/sandbox.rs"]
mod sandbox;
#[path = "end_to_end/supervision.rs"]
mod supervision;
#[path = "end_to_end/targets.rs"]
mod targets;
#[path = "end_to_end/users.rs"]
mod users;
#[path = "end_to_end/withheld.rs"]
mod withheld;
#[path = "end_to_end/wrong_options.rs"]
mod wrong_options;

const MEMORY: u64 = 4 << 20;

/// The front end's own address of the guest's memory.
const BASE: u64 = 0x7000_0000;

/// The inflate queue and its message in the guest's memory.
const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const MESSAGE: u64 = 0x4000;

/// The queue for host requests in the guest's memory, its number without other features, and its buffers.
const REQUESTS: u64 = 0x8000;
const REQUESTS_NUMBER: usize = 2;
const BUFFERS: u64 = 0xb000;

/// Two more than the device has.
const QUEUES: u64 = 8;

/// How long the daemon may take to answer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A daemon, as its users start it.
struct Running(Child);

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-balloon");

fn command(directory: &Path) -> Command {
    command_of(Path::new(PROGRAM), directory)
}

fn command_of(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    for name in ["socket", "control", "state"] {
        command.arg(format!("--{name}")).arg(directory.join(name));
    }
    command
}

/// A copy of the program in a directory that all users can access. Only root can access the build directory.
fn program_for_others(directory: &Path) -> PathBuf {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    let program = directory.join("program");
    fs::copy(PROGRAM, &program).unwrap();
    program
}

fn start(directory: &Path, arguments: &[&str]) -> Running {
    let daemon = Running(command(directory).args(arguments).spawn().unwrap());
    let control = directory.join("control");
    wait_for("the daemon", || Client::connect(&control).is_ok());
    daemon
}

impl Running {
    fn end(mut self) {
        kill(
            Pid::from_raw(self.0.id().try_into().unwrap()),
            Signal::SIGTERM,
        )
        .unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    /// A test that fails leaves no daemon.
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon in a directory of its own, with a VMM that is [`inflated`].
fn set_up() -> (TempDir, Running, Vmm) {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &[]);
    let vmm = inflated(directory.path());
    (directory, daemon, vmm)
}

/// A VMM with a new guest that has page 0x100 in the balloon.
fn inflated(directory: &Path) -> Vmm {
    let mut vmm = Vmm::connect(directory);
    vmm.start(0);
    vmm.inflate(0x100);
    vmm
}

fn info(directory: &Path) -> Info {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    client.call(&Request::Info {}).unwrap().parse().unwrap()
}

fn set(directory: &Path, bytes: u64) {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    client.call(&Request::set(bytes)).unwrap();
}

/// A VMM with a guest whose driver has inflated some messages.
struct Vmm {
    front: Frontend,
    memory: File,
    changes: UnixStream,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

impl Vmm {
    fn connect(directory: &Path) -> Self {
        Self::connect_with(directory, 0)
    }

    /// Connects for a driver that accepts these features.
    fn connect_with(directory: &Path, features: u64) -> Self {
        let socket = UnixStream::connect(directory.join("socket")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut front = Frontend::from_stream(socket, QUEUES);
        front.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let wanted = protocol | (1 << VIRTIO_F_VERSION_1) | features;
        assert_eq!(front.get_features().unwrap() & wanted, wanted);
        let offered = front.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::BACKEND_REQ));
        front.set_protocol_features(offered).unwrap();
        let (changes, theirs) = UnixStream::pair().unwrap();
        changes.set_read_timeout(Some(PATIENCE)).unwrap();
        front.set_backend_request_fd(&theirs).unwrap();
        front.set_features(wanted).unwrap();
        Self::new(front, changes)
    }

    /// The VMM of a connection, with its guest's memory.
    fn new(front: Frontend, changes: UnixStream) -> Self {
        let memory = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
        memory
            .write_all_at(&vec![1; usize::try_from(MEMORY).unwrap()], 0)
            .unwrap();
        memory.write_all_at(&[0; 0x4000], 0x1000).unwrap();
        memory.write_all_at(&[0; 0x3000], REQUESTS).unwrap();
        Self {
            front,
            memory,
            changes,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(0).unwrap(),
            sent: 0,
        }
    }

    fn start(&mut self, base: u16) {
        self.start_with(base, MEMORY);
    }

    fn start_with(&mut self, base: u16, memory_size: u64) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        self.front.set_mem_table(&[region]).unwrap();
        start_queue(
            &mut self.front,
            0,
            base,
            DESCRIPTORS,
            &self.kick,
            &self.call,
        );
    }

    fn store(&self, place: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, place).unwrap();
    }

    fn byte(&self, place: u64) -> u8 {
        let mut byte = [0];
        self.memory.read_exact_at(&mut byte, place).unwrap();
        byte[0]
    }

    /// Sends a message with one page, and waits until the device has used it.
    fn inflate(&mut self, pfn: u32) {
        self.send(&pfn.to_le_bytes());
    }

    /// The same, as a page set.
    fn inflate_set(&mut self, pfn: u64) {
        // Inflating, pages of 4 KiB, ranges; no request; 0; one page; it.
        let words = [0x010c_0001, 0, 0, 1, (pfn << 12) | 1];
        self.send(&words.map(u64::to_le_bytes).concat());
    }

    /// Sends a message, and waits until the device has used it.
    fn send(&mut self, message: &[u8]) {
        self.offer(message);
        self.wait_used();
    }

    fn offer(&mut self, message: &[u8]) {
        self.store(MESSAGE, message);
        self.store(DESCRIPTORS, &MESSAGE.to_le_bytes());
        let length = u32::try_from(message.len()).unwrap();
        self.store(DESCRIPTORS + 8, &length.to_le_bytes());
        self.store(AVAIL + 4 + 2 * u64::from(self.sent % 16), &[0, 0]);
        self.sent += 1;
        self.store(AVAIL + 2, &self.sent.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Waits until the device has used all messages.
    fn wait_used(&self) {
        let mut used = [0; 2];
        // A guest gets a spurious interrupt when another worker continues the queue.
        while u16::from_le_bytes(used) != self.sent {
            self.call.read().unwrap();
            self.memory.read_exact_at(&mut used, USED + 2).unwrap();
        }
    }

    /// Waits for the notification of a change of the configuration space.
    fn change(&mut self) {
        let mut message = [0; 12];
        self.changes.read_exact(&mut message).unwrap();
        assert_eq!(message[..4], 2_u32.to_ne_bytes());
        assert_eq!(message[8..], [0; 4]);
    }

    /// Discards the notifications that have arrived.
    fn forget_changes(&mut self) {
        self.changes.set_nonblocking(true).unwrap();
        while self.changes.read(&mut [0; 12]).is_ok() {}
        self.changes.set_nonblocking(false).unwrap();
    }

    fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) = self.front.get_config(0, 16, flags, &[0; 16]).unwrap();
        bytes
    }

    fn write_config(&mut self, bytes: &[u8]) {
        self.front
            .set_config(0, VhostUserConfigFlags::WRITABLE, bytes)
            .unwrap();
    }
}

/// Starts a queue whose rings are one page behind the other.
fn start_queue(
    front: &mut Frontend,
    number: usize,
    base: u16,
    rings: u64,
    kick: &EventFd,
    call: &EventFd,
) {
    front.set_vring_num(number, 16).unwrap();
    place_queue(front, number, base, rings, kick, call);
    front.set_vring_enable(number, true).unwrap();
}

/// The rings and the events of such a queue.
fn place_queue(
    front: &mut Frontend,
    number: usize,
    base: u16,
    rings: u64,
    kick: &EventFd,
    call: &EventFd,
) {
    let addresses = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: BASE + rings,
        avail_ring_addr: BASE + rings + AVAIL - DESCRIPTORS,
        used_ring_addr: BASE + rings + USED - DESCRIPTORS,
        log_addr: None,
    };
    front.set_vring_addr(number, &addresses).unwrap();
    front.set_vring_base(number, base).unwrap();
    front.set_vring_call(number, call).unwrap();
    front.set_vring_kick(number, kick).unwrap();
}

#[test]
fn a_guest_inflates_and_another_one_follows() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &[]);
    let mode = |name| {
        directory
            .join(name)
            .metadata()
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!([mode("socket"), mode("control")], [0o600; 2]);

    let mut vmm = Vmm::connect(directory);
    assert!(!info(directory).guest.driver);
    vmm.start(0);
    // The change before there was a driver.
    vmm.change();
    let running = info(directory);
    assert!(running.guest.connected && running.guest.driver);
    assert_eq!(running.memory, Some(MEMORY));
    assert_eq!(running.resident, Some(MEMORY));

    set(directory, 8 << 12);
    vmm.change();
    let mut config = vmm.config();
    assert_eq!(config[..4], 8_u32.to_le_bytes());

    vmm.inflate(0x100);
    assert_eq!(
        [0xff, 0x100, 0x101].map(|pfn| vmm.byte(pfn << 12)),
        [1, 0, 1]
    );
    assert_eq!(info(directory).resident, Some(MEMORY - (1 << 12)));

    // The guest's write contains a stale target.
    set(directory, 9 << 12);
    config[4..8].copy_from_slice(&1_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for("the balloon's size", || info(directory).size == 1 << 12);
    assert_eq!(info(directory).target, 9 << 12);

    drop(vmm);
    wait_for("the end of the VMM", || !info(directory).guest.connected);
    assert_eq!(
        (info(directory).memory, info(directory).resident),
        (None, None)
    );
    let vmm = inflated(directory);
    assert_eq!(vmm.byte(0x100 << 12), 0);
    let counters = info(directory).counters;
    assert_eq!(counters.inflated, 2 << 12);
    assert_eq!(counters.messages.inflate, 2);
    assert!(counters.notifications.inflate >= 2);
    assert_eq!(counters.received.inflate, 8);
    assert_eq!(counters.encodings["pfns"], 2);

    daemon.end();
    let left = |name| directory.join(name).exists();
    assert!(!left("socket") && !left("control") && left("state"));
}

/// What is in the balloon follows from the guest's messages, whatever the guest reports.
#[test]
fn the_daemon_counts_what_is_in_the_balloon() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    let mut config = vmm.config();
    config[4..8].copy_from_slice(&100_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for("the report", || info(directory).size == 100 << 12);
    wait_for("the page", || info(directory).held == 1 << 12);
    // In the balloon already, another one, and outside of the guest's memory.
    for pfn in [0x100, 0x101, 0x1000] {
        vmm.inflate(pfn);
    }
    wait_for("two pages", || info(directory).held == 2 << 12);

    // A new driver has an empty balloon.
    vmm.front.get_vring_base(0).unwrap();
    vmm.store(AVAIL + 2, &[0, 0]);
    vmm.store(USED + 2, &[0, 0]);
    vmm.sent = 0;
    vmm.start(0);
    vmm.inflate(0x102);
    wait_for("its page", || info(directory).held == 1 << 12);
    drop(vmm);
    wait_for("the end of the VMM", || info(directory).held == 0);
    daemon.end();
}

#[test]
fn only_a_stopped_guest_keeps_its_balloon() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();

    let base = vmm.front.get_vring_base(0).unwrap();
    assert_eq!(base, 1);
    assert!(!info(directory).guest.driver);
    vmm.start(1);
    vmm.store(0x100 << 12, &[7]);
    vmm.inflate(0x100);
    assert_eq!(vmm.byte(0x100 << 12), 7, "the page is still in the balloon");
    assert_eq!(info(directory).counters.refused["already-in-balloon"], 1);

    vmm.front.get_vring_base(0).unwrap();
    vmm.store(AVAIL + 2, &[0, 0]);
    vmm.store(USED + 2, &[0, 0]);
    vmm.sent = 0;
    vmm.start(0);
    vmm.inflate(0x100);
    assert_eq!(
        vmm.byte(0x100 << 12),
        0,
        "a new driver has an empty balloon"
    );
    daemon.end();
}

#[test]
fn messages_are_what_was_negotiated() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    let mut vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_PAGE_SETS);
    vmm.start(0);
    vmm.inflate_set(0x100);
    assert_eq!(info(directory).guest.features, ["page-sets"]);
    assert_eq!(
        [0xff, 0x100, 0x101].map(|pfn| vmm.byte(pfn << 12)),
        [1, 0, 1]
    );
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 1, "that is no page set");

    // Another driver, after a reset.
    vmm.front.get_vring_base(0).unwrap();
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    vmm.front.set_features(protocol).unwrap();
    vmm.store(AVAIL + 2, &[0, 0]);
    vmm.store(USED + 2, &[0, 0]);
    vmm.store(0x100 << 12, &[7]);
    vmm.sent = 0;
    vmm.start(0);
    vmm.inflate(0x100);
    assert_eq!(vmm.byte(0x100 << 12), 0, "its balloon was empty");

    let counters = info(directory).counters;
    assert_eq!(
        (counters.encodings["pfns"], counters.encodings["ranges"]),
        (1, 1)
    );
    assert_eq!(counters.refused["malformed"], 1);
    daemon.end();
}

#[test]
fn a_restart_of_the_daemon_keeps_the_target() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    set(directory, 3 << 12);
    let mut config = vmm.config();
    config[4..8].copy_from_slice(&1_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for("the balloon's size", || info(directory).size == 1 << 12);
    daemon.end();

    let daemon = start(directory, &[]);
    let Vmm { memory, sent, .. } = vmm;
    let mut vmm = Vmm {
        memory,
        sent,
        ..Vmm::connect(directory)
    };
    vmm.start(sent);
    vmm.change();
    assert_eq!(info(directory).target, 3 << 12);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    daemon.end();
}

#[test]
fn half_a_message_does_not_keep_the_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &[]);
    let mut front = UnixStream::connect(directory.path().join("socket")).unwrap();
    front.write_all(&[1; 4]).unwrap();
    wait_for("the VMM", || info(directory.path()).guest.connected);
    daemon.end();
}

#[test]
fn rings_that_no_device_takes_end_no_vmm() {
    let (directory, daemon, mut vmm) = set_up();
    let addresses = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: BASE + DESCRIPTORS + 1,
        used_ring_addr: BASE + USED,
        avail_ring_addr: BASE + AVAIL,
        log_addr: None,
    };
    vmm.front.set_vring_addr(0, &addresses).unwrap();
    assert_eq!(vmm.config().len(), 16);
    vmm.inflate(0x101);
    assert_eq!(vmm.byte(0x101 << 12), 0);
    assert!(info(directory.path()).guest.connected);
    daemon.end();
}

#[test]
fn there_is_one_daemon_for_a_socket() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &[]);
    let second = command(directory.path()).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success());
    assert!(error.contains("another daemon"), "{error}");
    daemon.end();
}

fn call(directory: &Path, request: &Request) -> Result<Answer, ClientError> {
    Client::connect(&directory.join("control"))?.call(request)
}

#[test]
fn another_process_knows_what_is_in_the_balloon() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    let pid = Pid::from_raw(daemon.0.id().try_into().unwrap());
    for (signal, other) in [(Signal::SIGHUP, 0x102), (Signal::SIGKILL, 0x103)] {
        match signal {
            Signal::SIGHUP => kill(pid, signal).unwrap(),
            _ => kill(worker(pid), signal).unwrap(),
        }
        wait_for("another process", || {
            let now = call(directory, &Request::Info {}).and_then(|answer| answer.parse::<Info>());
            now.is_ok_and(|now| now.counters.messages.inflate == 0 && now.guest.driver)
        });
        vmm.store(0x100 << 12, &[7]);
        vmm.inflate(other);
        vmm.inflate(0x100);
        assert_eq!(vmm.byte(0x100 << 12), 7, "the page is still in the balloon");
        assert_eq!(info(directory).counters.refused["already-in-balloon"], 1);
    }
    daemon.end();
}

#[test]
fn what_a_dump_has_read_of_the_balloon_is_given_back() {
    const PAGES: [u32; 3] = [0x100, 0x101, 0x200];
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--granule=4K", "--features=must-tell-host"]);
    let mut vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_MUST_TELL_HOST);
    vmm.start(0);
    PAGES.map(|page| vmm.inflate(page));
    let blocks = |vmm: &Vmm| vmm.memory.metadata().unwrap().blocks();
    let before = blocks(&vmm);

    assert_eq!(vmm.front.get_vring_base(0).unwrap(), 3);
    let file = FileOffset::new(vmm.memory.try_clone().unwrap(), 0);
    let mapping: MmapRegion = MmapRegion::from_file(file, MEMORY.try_into().unwrap()).unwrap();
    for page in (0..MEMORY).step_by(4096) {
        let place = page.try_into().unwrap();
        mapping.as_volatile_slice().read_obj::<u8>(place).unwrap();
    }
    assert_eq!(blocks(&vmm), before + 3 * 8);
    vmm.start(3);
    wait_for("the memory of the balloon", || blocks(&vmm) == before);
    vmm.inflate(0x102);
    assert_eq!(vmm.byte(0x102 << 12), 0);
    assert_eq!(info(directory).counters.discarded, (2 * 3 + 1) << 12);
    daemon.end();
}

/// The worker process of a daemon.
fn worker(daemon: Pid) -> Pid {
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).unwrap();
    Pid::from_raw(children.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
fn a_broken_state_file_starts_the_daemon_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    fs::write(directory.join("state"), "").unwrap();
    let daemon = start(directory, &[]);
    assert_eq!(info(directory).target, 0);
    assert!(directory.join("state.bad").exists());
    // The file may have had one, and another worker must not forget it.
    assert_eq!(info(directory).withheld, ["inhibited"]);
    let worker = daemon.worker();
    kill(worker, Signal::SIGKILL).unwrap();
    daemon.wait_for_another(worker);
    wait_for("another worker", || {
        let now = call(directory, &Request::Info {}).and_then(|answer| answer.parse::<Info>());
        now.is_ok_and(|now| now.withheld == ["inhibited"])
    });
    daemon.end();
}

/// The longest wait of a VMM while the guest keeps its device busy: for the configuration space, and for stopping a
/// queue.
#[test]
#[ignore = "a measurement: run it with --ignored --nocapture"]
fn longest_wait() {
    const LARGE: u64 = 2 << 30;
    // The messages, which each turn reads again, come before.
    const FIRST: u64 = 0x200;
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    // Of reads of an idle device, of reads of a busy one, and of stopping its queue.
    let mut longest = [Duration::ZERO; 3];
    // All of memory as one range, and every other page of it in bitmaps.
    let pages = (LARGE >> 12) - FIRST;
    let range = [0x010c_0001, 0, 0, pages, FIRST << 12, pages];
    let range: Vec<u8> = range
        .iter()
        .flat_map(|word: &u64| word.to_le_bytes())
        .collect();
    let bitmaps: Vec<Vec<u8>> = (0..16_u64)
        .map(|number| {
            let words = vec![0x5555_5555_5555_5555_u64; 500];
            let header = [0x020c_0001, 0, FIRST + number * 32000, 500 * 32];
            header
                .iter()
                .chain(&words)
                .flat_map(|word| word.to_le_bytes())
                .collect()
        })
        .collect();
    for messages in [vec![range], bitmaps] {
        let mut vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_PAGE_SETS);
        vmm.memory.set_len(LARGE).unwrap();
        let ones = vec![1; 64 << 20];
        for place in (64 << 20..LARGE).step_by(64 << 20) {
            vmm.memory.write_all_at(&ones, place).unwrap();
        }
        vmm.start_with(0, LARGE);
        let mut wait = |what: usize, call: &mut dyn FnMut()| {
            let start = Instant::now();
            call();
            longest[what] = longest[what].max(start.elapsed());
        };
        for _ in 0..5000 {
            wait(0, &mut || drop(vmm.config()));
        }
        for (number, message) in (0_u16..).zip(&messages) {
            let place = (1 << 20) + 64 * 1024 * u64::from(number);
            vmm.store(place, message);
            let descriptor = DESCRIPTORS + 16 * u64::from(number);
            vmm.store(descriptor, &place.to_le_bytes());
            let length = u32::try_from(message.len()).unwrap();
            vmm.store(descriptor + 8, &length.to_le_bytes());
            vmm.store(AVAIL + 4 + 2 * u64::from(number), &number.to_le_bytes());
        }
        let sent = u16::try_from(messages.len()).unwrap();
        vmm.store(AVAIL + 2, &sent.to_le_bytes());
        vmm.kick.write(1).unwrap();
        let used = |vmm: &Vmm| u16::from_le_bytes([vmm.byte(USED + 2), vmm.byte(USED + 3)]);
        let mut reads = 0;
        while used(&vmm) < sent {
            wait(1, &mut || drop(vmm.config()));
            reads += 1;
            if reads == 5 {
                wait(2, &mut || {
                    vmm.front.get_vring_base(0).unwrap();
                });
                vmm.start_with(0, LARGE);
            }
        }
        let Counters {
            discards, refused, ..
        } = info(directory).counters;
        assert!(refused.is_empty(), "{refused:?}");
        println!(
            "{} messages, {discards} discards by now, {reads} reads of the configuration space",
            messages.len()
        );
        drop(vmm);
        wait_for("the end of the VMM", || !info(directory).guest.connected);
    }
    println!(
        "a read took {:?} at most, and {:?} of an idle device; stopping a queue {:?}",
        longest[1], longest[0], longest[2]
    );
    daemon.end();
}

#[test]
fn the_vm_has_a_name_and_a_process() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = start(directory.path(), &["--name", "web"]);
    let identity = || {
        let info = info(directory.path());
        (info.name, info.vmm)
    };
    let web = Some("web".to_owned());
    assert_eq!(identity(), (web.clone(), None));
    let vmm = inflated(directory.path());
    let process = std::process::id().try_into().unwrap();
    assert_eq!(identity(), (web.clone(), Some(process)));
    drop(vmm);
    wait_for("the end of the VMM", || identity() == (web.clone(), None));
}
