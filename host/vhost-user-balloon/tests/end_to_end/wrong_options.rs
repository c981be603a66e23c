// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU itself, with every wrong option that a user can give its device, its memory or the daemon.
//!
//! The guest is this test: it drives the virtio-mmio device through QEMU's qtest protocol.

use std::io::{BufRead, BufReader};
use std::process::{ChildStdin, ChildStdout, Stdio};

use super::supervision::{log, start_logged, wait_for_line};
use super::*;

/// Registers of a virtio-mmio device (specification, clause 4.2.2).
const MAGIC: u64 = 0x000;
const DEVICE_ID: u64 = 0x008;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

/// The addresses of the inflate queue, its message and a page in the guest's memory.
const RINGS: u64 = 0x10_0000;
const PFNS: u64 = 0x20_0000;
const PAGE: u64 = 0x80_0000;

/// The memory of a correctly configured guest.
pub(super) const SHARED: &[&str] = &[
    "-machine",
    "memory-backend=memory",
    "-object",
    "memory-backend-memfd,id=memory,size=64M,share=on",
];

/// The outcome for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Its balloon works.
    Balloon,
    /// It runs, and a page that its driver inflates is not discarded.
    NoBalloon,
    /// QEMU does not start.
    NoStart,
}
use Outcome::{Balloon, NoBalloon, NoStart};

/// A way to start QEMU and the daemon.
pub(super) struct Row {
    /// Arguments of the daemon.
    daemon: &'static [&'static str],
    memory: &'static [&'static str],
    /// Properties of QEMU's device.
    pub(super) device: &'static str,
    outcome: Outcome,
    /// The text in the daemon's log. Empty if there is no warning and no error.
    line: &'static str,
}

pub(super) const RIGHT: Row = Row {
    daemon: &[],
    memory: SHARED,
    device: "virtio-id=5,num_vqs=5,vq_size=256,config_size=16",
    outcome: Balloon,
    line: "",
};

const ROWS: &[Row] = &[
    RIGHT,
    Row {
        device: "virtio-id=5,num_vqs=3,vq_size=256,config_size=16",
        line: "num_vqs=5",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,vq_size=256,config_size=16",
        line: "num_vqs=5",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=7,vq_size=256,config_size=16",
        line: "num_vqs=5",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=64,vq_size=256,config_size=16",
        line: "num_vqs=5",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=5,vq_size=100,config_size=16",
        outcome: NoBalloon,
        line: "vq_size=256",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=5,vq_size=256",
        outcome: NoStart,
        line: "config_size=16",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=5,vq_size=256,config_size=8",
        line: "config_size=16",
        ..RIGHT
    },
    // The target, and not the balloon's size.
    Row {
        device: "virtio-id=5,num_vqs=5,vq_size=256,config_size=4",
        line: "config_size=16",
        ..RIGHT
    },
    Row {
        device: "virtio-id=5,num_vqs=5,vq_size=256,config_size=64",
        ..RIGHT
    },
    Row {
        device: "virtio-id=4,num_vqs=5,vq_size=256,config_size=16",
        outcome: NoBalloon,
        line: "virtio-id=5",
        ..RIGHT
    },
    Row {
        memory: &[
            "-machine",
            "memory-backend=memory",
            "-object",
            "memory-backend-memfd,id=memory,size=64M,share=off",
        ],
        outcome: NoBalloon,
        line: "share=on",
        ..RIGHT
    },
    Row {
        memory: &[
            "-machine",
            "memory-backend=memory",
            "-object",
            "memory-backend-ram,id=memory,size=64M",
        ],
        outcome: NoBalloon,
        line: "share=on",
        ..RIGHT
    },
    Row {
        memory: &[],
        outcome: NoBalloon,
        line: "memory-backend=",
        ..RIGHT
    },
    // The daemon cannot know that this memory must stay.
    Row {
        memory: &[
            "-machine",
            "memory-backend=memory",
            "-object",
            "memory-backend-memfd,id=memory,size=64M,share=on,prealloc=on",
        ],
        ..RIGHT
    },
    // The extensions on one side only.
    Row {
        daemon: &["--extensions"],
        device: "virtio-id=5,num_vqs=5,vq_size=256,config_size=24",
        line: "num_vqs=6",
        ..RIGHT
    },
    Row {
        daemon: &["--extensions"],
        device: "virtio-id=5,num_vqs=6,vq_size=256,config_size=16",
        line: "config_size=24",
        ..RIGHT
    },
    // That does no harm, and needs no warning.
    Row {
        device: "virtio-id=5,num_vqs=6,vq_size=256,config_size=24",
        ..RIGHT
    },
];

/// QEMU has ended.
#[derive(Debug)]
pub(super) struct Ended;

/// QEMU with a machine that has no processor, and its device.
pub(super) struct Qemu {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// The address of the device's registers.
    device: u64,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    /// Starts it with devices on a daemon's socket.
    fn start(socket: &Path, memory: &[&str], devices: &[&str]) -> Self {
        let mut command = Self::command(socket, memory, devices);
        command.stderr(Stdio::null());
        Self::spawn(&mut command)
    }

    /// The command that starts it.
    pub(super) fn command(socket: &Path, memory: &[&str], devices: &[&str]) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-machine",
                "microvm,accel=qtest",
                "-m",
                "64M",
                "-nodefaults",
            ])
            .args(["-display", "none", "-qtest", "stdio", "-qtest-log", "none"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(memory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        for (number, device) in devices.iter().enumerate() {
            let path = socket.display();
            command.args([
                "-chardev",
                &format!("socket,id=socket{number},path={path}"),
                "-device",
                &format!("vhost-user-test-device,chardev=socket{number},{device}"),
            ]);
        }
        command
    }

    pub(super) fn spawn(command: &mut Command) -> Self {
        let mut process = command.spawn().unwrap();
        Self {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()),
            process,
            device: 0,
        }
    }

    /// Sends a command of the qtest protocol, and returns the answer.
    fn call(&mut self, command: &str) -> Result<String, Ended> {
        writeln!(self.input, "{command}").map_err(|_| Ended)?;
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).map_err(|_| Ended)? == 0 {
                return Err(Ended);
            }
            // Other lines are about interrupts.
            if let Some(answer) = line.strip_prefix("OK") {
                return Ok(answer.trim().to_owned());
            }
        }
    }

    fn read(&mut self, register: u64) -> Result<u64, Ended> {
        let address = self.device + register;
        let value = self.call(&format!("readl {address:#x}"))?;
        Ok(u64::from_str_radix(value.trim_start_matches("0x"), 16).unwrap())
    }

    fn write(&mut self, register: u64, value: u64) -> Result<(), Ended> {
        let address = self.device + register;
        self.call(&format!("writel {address:#x} {value:#x}"))
            .map(drop)
    }

    fn store(&mut self, address: u64, bytes: &[u8]) -> Result<(), Ended> {
        let digits: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let hex = digits.concat();
        let length = bytes.len();
        self.call(&format!("write {address:#x} {length} 0x{hex}"))
            .map(drop)
    }

    fn byte(&mut self, address: u64) -> Result<u8, Ended> {
        let byte = self.call(&format!("read {address:#x} 1"))?;
        Ok(u8::from_str_radix(byte.trim_start_matches("0x"), 16).unwrap())
    }

    /// Finds the device in one of the machine's slots.
    fn find(&mut self) -> Result<(), Ended> {
        for slot in 0..24 {
            self.device = 0xfeb0_0000 + 0x200 * slot;
            if self.read(MAGIC)? == 0x7472_6976 && self.read(DEVICE_ID)? != 0 {
                return Ok(());
            }
        }
        panic!("the machine has no virtio device");
    }

    /// Starts the device with the two queues that every balloon has.
    fn start_driver(&mut self) -> Result<(), Ended> {
        for status in [0, 1, 3] {
            self.write(STATUS, status)?;
        }
        // VIRTIO_F_VERSION_1.
        for (word, features) in [(1, 1), (0, 0)] {
            self.write(DRIVER_FEATURES_SEL, word)?;
            self.write(DRIVER_FEATURES, features)?;
        }
        self.write(STATUS, 11)?;
        for queue in 0..2 {
            self.write(QUEUE_SEL, queue)?;
            let size = self.read(QUEUE_NUM_MAX)?;
            if size == 0 {
                continue;
            }
            let rings = RINGS + queue * 0x8000;
            self.write(QUEUE_NUM, size)?;
            self.write(QUEUE_DESC, rings)?;
            self.write(QUEUE_DRIVER, rings + 0x2000)?;
            self.write(QUEUE_DEVICE, rings + 0x4000)?;
            self.write(QUEUE_READY, 1)?;
        }
        self.write(STATUS, 15)
    }

    /// Sends a page to the inflate queue, or a device-writable buffer, as drivers of other devices
    /// do.
    fn inflate(&mut self, writable: bool) -> Result<(), Ended> {
        self.store(PAGE, &[0xff])?;
        let pfn = u32::try_from(PAGE >> 12).unwrap();
        self.store(PFNS, &pfn.to_le_bytes())?;
        let descriptor = [
            &PFNS.to_le_bytes()[..],
            &4_u32.to_le_bytes(),
            &[if writable { 2 } else { 0 }, 0, 0, 0],
        ];
        self.store(RINGS, &descriptor.concat())?;
        self.store(RINGS + 0x2000, &[0, 0, 1, 0, 0, 0])?;
        self.write(QUEUE_NOTIFY, 0)
    }

    /// Runs the guest until its end.
    pub(super) fn run(&mut self, row: &Row, directory: &Path) -> Result<(), Ended> {
        self.find()?;
        self.start_driver()?;
        self.read(CONFIG)?;
        self.inflate(row.device.contains("virtio-id=4"))?;
        if row.outcome == Balloon {
            let start = Instant::now();
            while self.byte(PAGE)? != 0 {
                assert!(start.elapsed() < PATIENCE, "{}", row.device);
                thread::sleep(Duration::from_millis(5));
            }
        }
        if !row.line.is_empty() {
            wait_for_line(directory, row.line);
        }
        if row.outcome == NoBalloon {
            assert_eq!(self.byte(PAGE)?, 0xff, "{}", row.device);
        }
        // QEMU aborts on an access to the configuration space when its device has no back end.
        self.write(CONFIG + 4, 1)?;
        self.read(CONFIG)?;
        self.write(STATUS, 0)?;
        self.start_driver()?;
        self.read(CONFIG)?;
        self.write(STATUS, 0)
    }
}

/// Whether there is a QEMU. The host's programs can be tested without one.
pub(super) fn has_qemu() -> bool {
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

#[test]
fn no_option_ends_the_vm() {
    if !has_qemu() {
        return;
    }
    for row in ROWS {
        let Row {
            daemon: arguments,
            memory,
            device,
            outcome,
            line,
        } = row;
        let what = format!("{arguments:?} {memory:?} {device}");
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let daemon = start_logged(directory, arguments);
        let worker = daemon.worker();
        let mut qemu = Qemu::start(&directory.join("socket"), memory, &[device]);
        let ran = qemu.run(row, directory);
        assert_eq!(
            ran.is_err(),
            *outcome == NoStart,
            "{what}: {}",
            log(directory)
        );
        // The line about a device that is not set up in time would have appeared by now.
        drop(qemu);
        wait_for_line(directory, "the VMM is gone");
        let lines = log(directory);
        let complaints: Vec<_> = lines
            .lines()
            .filter(|line| line.starts_with("[WARN") || line.starts_with("[ERROR"))
            .collect();
        assert_eq!(
            complaints.len(),
            usize::from(!line.is_empty()),
            "{what}: {lines}"
        );
        assert!(
            complaints.iter().all(|found| found.contains(line)),
            "{what}: {lines}"
        );
        assert_eq!(daemon.worker(), worker, "{what}: another worker: {lines}");
        daemon.end();
    }
}

#[test]
fn a_device_without_a_driver_may_be_another_one() {
    if !has_qemu() {
        return;
    }
    // On a busy machine a guest needs more time.
    let grace = [1, 4, 16, 64].into_iter().find(|&grace| has_driver(grace));
    grace.expect("a driver that starts the device within a minute");

    // This guest has no driver for that device.
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &["--boot-grace", "1"]);
    let device = RIGHT.device.replace("virtio-id=5", "virtio-id=4");
    let _qemu = Qemu::start(&directory.join("socket"), SHARED, &[&device]);
    wait_for_line(directory, "virtio-id=5");
    daemon.end();
}

/// Runs a guest whose driver starts the device, and returns whether that took at most `grace` seconds. The daemon then
/// may not suspect another device.
fn has_driver(grace: u64) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &["--boot-grace", &grace.to_string()]);
    let grace = Duration::from_secs(grace);
    let start = Instant::now();
    let mut qemu = Qemu::start(&directory.join("socket"), SHARED, &[RIGHT.device]);
    qemu.run(&RIGHT, directory).unwrap();
    let in_time = start.elapsed() < grace;
    if in_time {
        thread::sleep(grace + Duration::from_millis(500));
        drop(qemu);
        wait_for_line(directory, "the VMM is gone");
        assert!(!log(directory).contains("virtio-id=5"));
    }
    daemon.end();
    in_time
}

#[test]
fn a_socket_has_one_device_of_one_vm() {
    if !has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start_logged(directory, &[]);
    let socket = directory.join("socket");
    let refused = || {
        let log = log(directory);
        log.matches("refusing a second VMM or device").count()
    };
    // Two devices of one VM. On a busy machine the second one may come after a second of silence, and QEMU ends then,
    // too.
    wait_for("a device that is refused", || {
        let mut qemu = Qemu::start(&socket, SHARED, &[RIGHT.device; 2]);
        assert!(qemu.find().is_err());
        refused() > 0
    });
    let before = refused();
    // Two VMs.
    let mut first = Qemu::start(&socket, SHARED, &[RIGHT.device]);
    first.find().unwrap();
    let mut second = Qemu::start(&socket, SHARED, &[RIGHT.device]);
    assert!(second.find().is_err());
    first.run(&RIGHT, directory).unwrap();
    assert_eq!(refused(), before + 1);
    daemon.end();
}
