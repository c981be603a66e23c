// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of a front end when a process of the daemon ends or hangs, or when the setup of the front end is
//! wrong.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc;

use rustix::process::{Resource, Rlimit, prlimit};
use service_manager::ServiceManager;

use super::targets::lease;
use super::*;

/// The children of a process.
fn children(pid: u32) -> Vec<Pid> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

impl Running {
    pub(super) fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().try_into().unwrap())
    }

    /// The worker, when there is one.
    pub(super) fn worker(&self) -> Pid {
        let mut worker = None;
        wait_for("a worker", || {
            worker = children(self.0.id()).first().copied();
            worker.is_some()
        });
        worker.unwrap()
    }

    /// Limits the supervisor to its current file descriptors. A lower limit would make its poll()
    /// of these fail.
    fn limit_descriptors(&self) {
        let descriptors = PathBuf::from(format!("/proc/{}/fd", self.pid()));
        let free = (0_u64..).find(|number| {
            let descriptor = descriptors.join(number.to_string());
            fs::symlink_metadata(descriptor).is_err()
        });
        self.allow_descriptors(free);
    }

    fn allow_descriptors(&self, current: Option<u64>) {
        let pid = rustix::process::Pid::from_raw(self.pid().as_raw());
        let maximum = Some(1024);
        let limit = Rlimit { current, maximum };
        prlimit(pid, Resource::Nofile, limit).unwrap();
    }

    pub(super) fn wait_for_another(&self, worker: Pid) {
        wait_for("another worker", || {
            children(self.0.id())
                .first()
                .is_some_and(|&now| now != worker)
        });
    }
}

/// A daemon with its log in a file.
pub(super) fn start_logged(directory: &Path, arguments: &[&str]) -> Running {
    let log = open_log(directory);
    let daemon = command(directory).args(arguments).stderr(log).spawn();
    let daemon = Running(daemon.unwrap());
    let control = directory.join("control");
    wait_for("the daemon", || Client::connect(&control).is_ok());
    daemon
}

fn open_log(directory: &Path) -> File {
    let mut options = File::options();
    options.create(true).append(true);
    options.open(directory.join("log")).unwrap()
}

pub(super) fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("log")).unwrap()
}

/// The errors in the log.
fn errors(directory: &Path) -> Vec<String> {
    log(directory)
        .lines()
        .filter(|line| line.contains("ERROR"))
        .map(str::to_owned)
        .collect()
}

pub(super) fn wait_for_line(directory: &Path, line: &str) {
    wait_for(line, || log(directory).contains(line));
}

/// Stops a process where it is.
fn stop(process: Pid) {
    kill(process, Signal::SIGSTOP).unwrap();
    // Each of its threads stops when it next runs.
    wait_for("the stop", || {
        let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
        threads
            .map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap())
            .all(|stat| stat.contains(") T "))
    });
}

/// Waits until the daemon reports it. A worker's clients are disconnected when the worker is replaced.
pub(super) fn wait_for_info(what: &str, directory: &Path, is: impl Fn(&Info) -> bool) {
    wait_for(what, || {
        let now = call(directory, &Request::Info {}).and_then(|answer| answer.parse());
        now.is_ok_and(|now| is(&now))
    });
}

/// Sets a size, and inflates a page: the full path of a working VM.
pub(super) fn works(directory: &Path, vmm: &mut Vmm, pfn: u32) {
    assert_eq!(vmm.config().len(), 16);
    vmm.store(u64::from(pfn) << 12, &[1]);
    vmm.inflate(pfn);
    assert_eq!(vmm.byte(u64::from(pfn) << 12), 0);
    assert!(info(directory).guest.driver);
}

#[test]
fn killed_workers_are_replaced() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    set(directory, 5 << 12);
    for pfn in 0x101..0x105 {
        let worker = daemon.worker();
        kill(worker, Signal::SIGKILL).unwrap();
        // The front end waits for another worker.
        assert_eq!(vmm.config().len(), 16);
        daemon.wait_for_another(worker);
        wait_for_info("the driver", directory, |now| now.guest.driver);
        assert_eq!(vmm.config()[..4], 5_u32.to_le_bytes());
        works(directory, &mut vmm, pfn);
    }
    daemon.end();
}

impl Vmm {
    /// The guest reboots, and has another driver.
    fn reboot(&mut self) {
        self.front.get_vring_base(0).unwrap();
        self.store(AVAIL + 2, &[0, 0]);
        self.store(USED + 2, &[0, 0]);
        self.sent = 0;
        self.start(0);
    }
}

/// The size of the balloon that is requested, in balloon pages.
fn requested(vmm: &mut Vmm) -> u32 {
    u32::from_le_bytes(vmm.config()[..4].try_into().unwrap())
}

#[test]
fn a_guest_that_boots_is_left_alone_by_another_worker() {
    let (directory, daemon, mut vmm) = set_up();
    let directory = directory.path();
    set(directory, 5 << 12);
    let mut config = vmm.config();
    config[4..8].copy_from_slice(&5_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for_info("the balloon's size", directory, |now| now.size == 5 << 12);
    vmm.reboot();
    wait_for_info("the new driver", directory, |now| {
        now.guest.driver && now.size == 0
    });
    assert_eq!(requested(&mut vmm), 0);
    let worker = daemon.worker();
    kill(worker, Signal::SIGKILL).unwrap();
    daemon.wait_for_another(worker);
    wait_for_info("the driver", directory, |now| now.guest.driver);
    assert_eq!(info(directory).size, 0);
    assert_eq!(requested(&mut vmm), 0);
    daemon.end();
}

#[test]
fn another_driver_reports_anew_whenever_workers_are_killed() {
    let service = Service::new();
    let directory = service.directory.path();
    let mut daemon = service.start(&["--extensions"]);
    let features = (1 << VIRTIO_BALLOON_F_PAGE_SETS) | (1 << VIRTIO_BALLOON_F_STATUS);
    let mut vmm = Vmm::connect_with(directory, features);
    set(directory, 5 << 12);
    vmm.start(0);
    // A status of five pages.
    let status = [&[8, 0], &[0; 14][..], &[5, 0, 0, 0], &[0; 4]].concat();
    vmm.send(&status);
    wait_for_info("the status", directory, |now| now.size == 5 << 12);
    let mut config = vmm.config();

    // The pause before the next worker is four seconds then.
    for _ in 0..4 {
        let worker = daemon.worker();
        kill(worker, Signal::SIGKILL).unwrap();
        wait_for("the end of the worker", || {
            children(daemon.0.id()).first() != Some(&worker)
        });
    }
    // The driver's write of the poison value has an old size.
    config[12..16].copy_from_slice(&[1; 4]);
    vmm.write_config(&config);
    vmm.reboot();
    // The supervisor answers, and knows the target of the driver before.
    assert_eq!(requested(&mut vmm), 0);
    service.end(&mut daemon, Signal::SIGKILL);
    daemon = service.start(&["--extensions"]);
    for _ in 0..2 {
        wait_for_info("the driver", directory, |now| now.guest.driver);
        assert_eq!(info(directory).size, 0);
        assert_eq!(requested(&mut vmm), 0);
        let worker = daemon.worker();
        kill(worker, Signal::SIGKILL).unwrap();
        daemon.wait_for_another(worker);
    }
    // A reported size stays.
    vmm.send(&status);
    let worker = daemon.worker();
    kill(worker, Signal::SIGKILL).unwrap();
    daemon.wait_for_another(worker);
    wait_for_info("the size", directory, |now| now.size == 5 << 12);
    daemon.end();
}

#[test]
fn another_worker_interrupts_the_guest() {
    let (_directory, daemon, vmm) = set_up();
    // The worker may have been killed before it did that.
    kill(daemon.worker(), Signal::SIGKILL).unwrap();
    let (sender, interrupt) = mpsc::channel();
    thread::spawn(move || sender.send(vmm.call.read().unwrap()));
    interrupt.recv_timeout(PATIENCE).unwrap();
    daemon.end();
}

#[test]
fn workers_that_cannot_be_started_are_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut vmm = inflated(directory);
    vmm.config();
    daemon.limit_descriptors();
    kill(daemon.worker(), Signal::SIGKILL).unwrap();
    wait_for("several tries", || {
        log(directory).matches("Too many open files").count() >= 4
    });
    // The front end does not wait for a worker.
    vmm.write_config(&[[0; 4], 1_u32.to_le_bytes()].concat());
    assert_eq!(vmm.config().len(), 16);
    assert_eq!(vmm.front.get_vring_base(0).unwrap(), 1);
    // The supervisor could not receive the file descriptors of a guest's earlier start.
    daemon.allow_descriptors(Some(1024));
    vmm.start(1);
    let start = Instant::now();
    while !call(directory, &Request::Info {})
        .and_then(|answer| answer.parse::<Info>())
        .is_ok_and(|now| now.guest.driver && now.size == 1 << 12)
    {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(50));
    }
    works(directory, &mut vmm, 0x101);
    daemon.end();
}

#[test]
fn missing_file_descriptors_are_not_taken_for_wrong_options() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut vmm = Vmm::connect(directory);
    vmm.config();
    daemon.limit_descriptors();
    vmm.start(0);
    assert_eq!(vmm.config().len(), 16);
    daemon.allow_descriptors(Some(1024));
    let lines = log(directory);
    assert!(
        lines.contains("no file descriptor is left for SET_MEM_TABLE from the VMM"),
        "{lines}"
    );
    assert!(!lines.contains("memory-backend"), "{lines}");
    daemon.end();
}

#[test]
fn a_worker_that_hangs_is_replaced() {
    let (directory, daemon, mut vmm) = set_up();
    let worker = daemon.worker();
    stop(worker);
    // QEMU would wait for this with its main loop.
    assert_eq!(vmm.config().len(), 16);
    assert_ne!(daemon.worker(), worker);
    wait_for_info("the driver", directory.path(), |now| now.guest.driver);
    works(directory.path(), &mut vmm, 0x101);
    daemon.end();
}

#[test]
fn a_worker_that_hangs_unnoticed_is_probed() {
    let (directory, daemon, mut vmm) = set_up();
    vmm.config();
    let worker = daemon.worker();
    stop(worker);
    let start = Instant::now();
    while daemon.worker() == worker {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(50));
    }
    wait_for_info("the driver", directory.path(), |now| now.guest.driver);
    works(directory.path(), &mut vmm, 0x101);
    daemon.end();
}

#[test]
fn a_killed_supervisor_leaves_no_worker() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let is_left = || {
        let processes = fs::read_dir("/proc").unwrap();
        processes.filter_map(Result::ok).any(|process| {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            // Before it runs the worker's program, a new process has the supervisor's arguments.
            line.contains(directory.to_str().unwrap())
        })
    };
    for _ in 0..20 {
        let mut daemon = command(directory).spawn().unwrap();
        wait_for("the socket", || directory.join("socket").exists());
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        wait_for("the end of the worker", || !is_left());
        // A process that ends has no arguments any more before it closes its sockets.
        for name in ["socket", "control"] {
            wait_for("the end of the sockets", || {
                UnixStream::connect(directory.join(name)).is_err()
            });
        }
    }
}

#[test]
fn a_worker_that_crashes_writes_no_core() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    info(directory);
    kill(daemon.worker(), Signal::SIGABRT).unwrap();
    wait_for_line(directory, "the worker has ended: signal: 6 (SIGABRT)");
    assert!(!log(directory).contains("core dumped"));
    daemon.end();
}

/// A daemon that is started repeatedly.
pub(super) struct Service {
    pub(super) directory: TempDir,
    manager: ServiceManager,
}

impl Service {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let manager = ServiceManager::new(directory.path()).unwrap();
        Self { directory, manager }
    }

    fn spawn(&self, arguments: &[&str]) -> Running {
        let directory = self.directory.path();
        let mut command = command(directory);
        command.args(arguments).stderr(open_log(directory));
        self.manager.prepare(&mut command).unwrap();
        Running(command.spawn().unwrap())
    }

    pub(super) fn start(&self, arguments: &[&str]) -> Running {
        let daemon = self.spawn(arguments);
        wait_for("the daemon", || self.manager.is_ready());
        daemon
    }

    /// Ends a daemon, and checks what remains of it.
    pub(super) fn end(&self, daemon: &mut Running, signal: Signal) {
        kill(daemon.pid(), signal).unwrap();
        let status = daemon.0.wait().unwrap();
        // A daemon that is killed may not have removed its previous snapshot.
        let most = match status.signal() {
            Some(signal) => {
                assert_eq!(signal, Signal::SIGKILL as i32);
                2
            }
            None => {
                assert!(status.success());
                1
            }
        };
        assert!((1..=most).contains(&self.manager.stored()));
    }
}

#[test]
fn a_restart_of_the_supervisor_keeps_the_vmm() {
    let service = Service::new();
    let directory = service.directory.path();
    let mut daemon = service.start(&[]);
    let mut vmm = inflated(directory);
    set(directory, 7 << 12);
    let mut config = vmm.config();
    config[4..8].copy_from_slice(&3_u32.to_le_bytes());
    vmm.write_config(&config);
    wait_for_info("the balloon's size", directory, |now| now.size == 3 << 12);
    for (pfn, signal) in (0x101..).zip([Signal::SIGTERM, Signal::SIGKILL].repeat(3)) {
        service.end(&mut daemon, signal);
        // A client and a front end that connect now wait.
        let mut client = Client::connect(&directory.join("control")).unwrap();
        daemon = service.start(&[]);
        client.call(&Request::Info {}).unwrap();
        wait_for_info("the driver", directory, |now| now.guest.driver);
        let info = info(directory);
        assert_eq!((info.target, info.size), (7 << 12, 3 << 12));
        works(directory, &mut vmm, pfn);
    }
    // Other options are for other VMs.
    service.end(&mut daemon, Signal::SIGTERM);
    let mut daemon = service.start(&["--features", "event-idx"]);
    wait_for_info("the driver", directory, |now| now.guest.driver);
    works(directory, &mut vmm, 0x120);
    drop(vmm);
    wait_for_info("the end of the VMM", directory, |now| !now.guest.connected);
    let vmm = inflated(directory);
    service.end(&mut daemon, Signal::SIGTERM);
    drop(vmm);
    let daemon = service.start(&[]);
    wait_for_info("the end of the VMM", directory, |now| !now.guest.connected);
    inflated(directory);
    assert_eq!(errors(directory), [""; 0]);
    daemon.end();
}

#[test]
fn the_configuration_is_read_after_a_restart_without_a_worker() {
    let service = Service::new();
    let directory = service.directory.path();
    let state = directory.join("state");
    let arguments = ["--state", state.to_str().unwrap()];
    let mut daemon = service.start(&arguments);
    let mut vmm = inflated(directory);
    set(directory, 5 << 12);
    assert_eq!(requested(&mut vmm), 5);
    let mut written = vmm.config();
    written[4..8].copy_from_slice(&3_u32.to_le_bytes());
    written[12..16].fill(0xaa);
    vmm.write_config(&written);
    let features = vmm.front.get_features().unwrap();
    // No worker can read it.
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    service.end(&mut daemon, Signal::SIGKILL);
    daemon = service.spawn(&arguments);
    // QEMU's main loop waits for this. The next write of a field sends all of them as they were read.
    assert_eq!(vmm.config(), written);
    assert_eq!(vmm.front.get_features().unwrap(), features);
    fs::remove_dir(&state).unwrap();
    wait_for_info("the driver", directory, |now| now.guest.driver);
    works(directory, &mut vmm, 0x101);
    daemon.end();
}

#[test]
fn a_new_driver_without_a_worker_reads_no_target_of_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let state = directory.join("state");
    let arguments = ["--state", state.to_str().unwrap(), "--boot-grace", "60"];
    let daemon = start(directory, &arguments);
    let mut vmm = inflated(directory);
    set(directory, 5 << 12);
    assert_eq!(requested(&mut vmm), 5);
    vmm.forget_changes();
    vmm.reboot();
    // The worker has started the new driver.
    vmm.change();
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    kill(daemon.worker(), Signal::SIGKILL).unwrap();
    assert_eq!(requested(&mut vmm), 0);
    fs::remove_dir(&state).unwrap();
    daemon.end();
}

#[test]
fn a_guest_that_resets_its_device_does_not_fill_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &["--boot-grace", "60"]);
    let mut vmm = inflated(directory);
    set(directory, 5 << 12);
    let starts = 20;
    for _ in 0..starts {
        vmm.reboot();
        wait_for_info("the new driver", directory, |now| {
            now.guest.driver && now.size == 0
        });
    }
    let lines = log(directory).matches("is left alone").count();
    assert!((1..starts / 2).contains(&lines), "{lines}");
    daemon.end();
}

#[test]
fn a_restart_keeps_a_vm_with_many_memory_regions() {
    // A message carries 253 file descriptors.
    const REGIONS: u64 = 300;
    const PAGE: u64 = 4096;
    // The start of the regions, in the guest and in the front end.
    const FIRST: u64 = 1 << 32;
    let service = Service::new();
    let directory = service.directory.path();
    let mut daemon = service.start(&[]);
    let mut vmm = inflated(directory);
    let memory = File::from(memfd_create("plugged", MFdFlags::empty()).unwrap());
    memory.set_len(REGIONS * PAGE).unwrap();
    for offset in (0..REGIONS).map(|number| number * PAGE) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: FIRST + offset,
            memory_size: PAGE,
            userspace_addr: FIRST + offset,
            mmap_offset: offset,
            mmap_handle: memory.as_raw_fd(),
        };
        vmm.front.add_mem_region(&region).unwrap();
    }
    let shared = MEMORY + REGIONS * PAGE;
    for (pfn, signal) in (0x101..).zip([Signal::SIGTERM, Signal::SIGKILL]) {
        wait_for_info("all memory", directory, |now| now.shared == Some(shared));
        service.end(&mut daemon, signal);
        daemon = service.start(&[]);
        wait_for_info("the driver", directory, |now| now.guest.driver);
        works(directory, &mut vmm, pfn);
    }
    assert_eq!(errors(directory), [""; 0]);
    daemon.end();
}

impl Vmm {
    fn region(&self, memory_size: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        }
    }

    /// A VMM that adds memory region by region, and whose guest has page 0x100 in the balloon.
    fn with_region(directory: &Path) -> Self {
        let mut vmm = Self::connect(directory);
        vmm.add(MEMORY);
        start_queue(&mut vmm.front, 0, 0, DESCRIPTORS, &vmm.kick, &vmm.call);
        vmm.inflate(0x100);
        vmm
    }

    fn add(&mut self, size: u64) {
        self.front.add_mem_region(&self.region(size)).unwrap();
    }

    /// Removes the memory, and waits until the daemon knows that.
    fn remove(&mut self, size: u64) {
        self.front.remove_mem_region(&self.region(size)).unwrap();
        assert_eq!(self.config().len(), 16);
    }
}

#[test]
fn a_notification_is_not_lost_while_memory_changes() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut vmm = Vmm::with_region(directory);
    vmm.remove(MEMORY);
    vmm.offer(&0x101_u32.to_le_bytes());
    wait_for("the notification", || {
        info(directory).counters.refused.contains_key("bad-chain")
    });
    vmm.add(MEMORY / 2);
    wait_for("the message", || vmm.byte(0x101 << 12) == 0);
    vmm.wait_used();
    works(directory, &mut vmm, 0x102);
    assert_eq!(errors(directory), [""; 0]);
    daemon.end();
}

#[test]
fn rings_outlive_a_change_of_their_memory() {
    let service = Service::new();
    let directory = service.directory.path();
    let mut daemon = service.start(&[]);
    let mut vmm = Vmm::with_region(directory);
    for (pfn, size) in (0x101..).zip([MEMORY, MEMORY / 2].repeat(2)) {
        vmm.remove(size);
        match pfn {
            0x101 | 0x102 => kill(daemon.worker(), Signal::SIGKILL).unwrap(),
            _ => {
                service.end(&mut daemon, Signal::SIGKILL);
                daemon = service.start(&[]);
            }
        }
        // The next worker is ready meanwhile.
        thread::sleep(Duration::from_millis(500));
        vmm.add(MEMORY + MEMORY / 2 - size);
        let lines = log(directory);
        assert!(!lines.contains("SET_VRING_ADDR"), "{lines}");
        wait_for_info("the driver", directory, |now| now.guest.driver);
        works(directory, &mut vmm, pfn);
    }

    // The front end does not wait for memory that it does not send.
    vmm.remove(MEMORY);
    service.end(&mut daemon, Signal::SIGKILL);
    let daemon = service.start(&[]);
    assert_eq!(vmm.config().len(), 16);
    daemon.end();
}

#[test]
fn a_supervisor_is_killed_at_any_time() {
    let service = Service::new();
    let directory = service.directory.path();
    let mut daemon = service.start(&[]);
    let mut vmm = inflated(directory);
    for round in 0..20_u32 {
        let pid = daemon.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(u64::from(round) * 150));
            kill(pid, Signal::SIGKILL).unwrap();
        });
        for value in 0..10_u32 {
            vmm.write_config(&[[0; 4], value.to_le_bytes()].concat());
        }
        let reader = thread::spawn(move || {
            let config = vmm.config();
            (vmm, config)
        });
        killer.join().unwrap();
        service.end(&mut daemon, Signal::SIGKILL);
        daemon = service.start(&[]);
        let (back, config) = reader.join().unwrap();
        vmm = back;
        assert_eq!(config[4..8], 9_u32.to_le_bytes());
        wait_for_info("the size", directory, |now| now.size == 9 << 12);
        works(directory, &mut vmm, 0x101 + round);
    }
    daemon.end();
}

/// A daemon whose program can be replaced.
struct Installed {
    directory: TempDir,
    program: PathBuf,
}

impl Installed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("vhost-user-balloon");
        fs::copy(env!("CARGO_BIN_EXE_vhost-user-balloon"), &program).unwrap();
        Self { directory, program }
    }

    fn start(&self) -> Running {
        let directory = self.directory.path();
        let log = File::create(directory.join("log")).unwrap();
        let mut command = Command::new(&self.program);
        for name in ["socket", "control", "state"] {
            command.arg(format!("--{name}")).arg(directory.join(name));
        }
        let daemon = Running(command.stderr(log).spawn().unwrap());
        wait_for("the daemon", || {
            Client::connect(&directory.join("control")).is_ok()
        });
        daemon
    }

    /// Replaces the program as a package does.
    fn install(&self, script: Option<&str>) {
        let new = self.program.with_extension("new");
        match script {
            Some(script) => fs::write(&new, script).unwrap(),
            None => drop(fs::copy(env!("CARGO_BIN_EXE_vhost-user-balloon"), &new).unwrap()),
        }
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &self.program).unwrap();
    }
}

#[test]
fn an_update_replaces_both_processes() {
    let installed = Installed::new();
    let directory = installed.directory.path();
    let daemon = installed.start();
    let mut vmm = inflated(directory);
    for pfn in 0x101..0x104 {
        let worker = daemon.worker();
        installed.install(None);
        kill(daemon.pid(), Signal::SIGHUP).unwrap();
        let new = fs::canonicalize(&installed.program).unwrap();
        wait_for("the new program", || {
            fs::read_link(format!("/proc/{}/exe", daemon.0.id())).is_ok_and(|path| path == new)
        });
        daemon.wait_for_another(worker);
        wait_for_info("the driver", directory, |now| now.guest.driver);
        works(directory, &mut vmm, pfn);
    }
    assert_eq!(info(directory).version, env!("CARGO_PKG_VERSION"));
    daemon.end();
    assert!(!directory.join("socket").exists() && !directory.join("control").exists());
}

#[test]
fn a_program_that_does_not_start_is_not_used() {
    let installed = Installed::new();
    let directory = installed.directory.path();
    let daemon = installed.start();
    let mut vmm = inflated(directory);
    let worker = daemon.worker();
    for (pfn, script) in (0x101..).zip(["#!/bin/sh\nexit 1\n", "nonsense", "#!/no/such/program\n"])
    {
        fs::write(directory.join("log"), "").unwrap();
        installed.install(Some(script));
        kill(daemon.pid(), Signal::SIGHUP).unwrap();
        wait_for_line(directory, "continuing with the running one");
        assert!(children(daemon.0.id()).contains(&worker));
        works(directory, &mut vmm, pfn);
    }
    // The running program is used for other workers, too.
    fs::remove_file(&installed.program).unwrap();
    kill(worker, Signal::SIGKILL).unwrap();
    daemon.wait_for_another(worker);
    wait_for_info("the driver", directory, |now| now.guest.driver);
    works(directory, &mut vmm, 0x110);
    daemon.end();
}

#[test]
fn a_program_that_fails_later_is_replaced_by_the_one_before() {
    let installed = Installed::new();
    let directory = installed.directory.path();
    let daemon = installed.start();
    let mut vmm = inflated(directory);
    // The trial succeeds, and the supervisor starts, but later workers fail.
    let real = directory.join("real");
    fs::copy(env!("CARGO_BIN_EXE_vhost-user-balloon"), &real).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).unwrap();
    let state = directory.join("state");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--resume*) rm -rf {0}; mkdir {0};; esac\nexec {1} \"$@\"\n",
        state.display(),
        real.display()
    );
    set(directory, 5 << 12);
    installed.install(Some(&script));
    kill(daemon.pid(), Signal::SIGHUP).unwrap();
    wait_for_line(directory, "continuing with the one before it");
    fs::remove_dir(&state).unwrap();
    wait_for_info("the driver", directory, |now| now.guest.driver);
    works(directory, &mut vmm, 0x101);
    daemon.end();
}

/// A worker that finds a lease or a broken file writes the file. Another worker has it during a trial.
#[test]
fn a_trial_leaves_the_state_file_alone() {
    for content in [None, Some("nonsense")] {
        let installed = Installed::new();
        let directory = installed.directory.path();
        let daemon = installed.start();
        let path = directory.join("state");
        lease(directory, 8 << 12, 60_000);
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let before = fs::read_to_string(&path).unwrap();
        let real = directory.join("real");
        fs::copy(PROGRAM, &real).unwrap();
        // The trial has ended when the supervisor starts.
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *--resume*) cp {0} {0}.seen;; esac\nexec {1} \"$@\"\n",
            path.display(),
            real.display()
        );
        installed.install(Some(&script));
        let worker = daemon.worker();
        kill(daemon.pid(), Signal::SIGHUP).unwrap();
        daemon.wait_for_another(worker);
        wait_for("the new program", || path.with_extension("seen").exists());
        wait_for("a client", || call(directory, &Request::Info {}).is_ok());
        let seen = fs::read_to_string(path.with_extension("seen")).unwrap();
        assert_eq!(seen, before);
        daemon.end();
    }
}

#[test]
fn a_second_device_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut vmm = inflated(directory);
    let mut second = UnixStream::connect(directory.join("socket")).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    wait_for_line(directory, "refusing a second VMM or device");
    works(directory, &mut vmm, 0x101);
    daemon.end();
}

#[test]
fn a_silent_client_makes_room_for_a_vmm() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let mut silent = UnixStream::connect(directory.join("socket")).unwrap();
    // Its second of silence begins when the daemon accepts it.
    wait_for_line(directory, "a VMM is connected");
    thread::sleep(Duration::from_millis(1100));
    let mut vmm = inflated(directory);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    works(directory, &mut vmm, 0x101);
    daemon.end();
}
