// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starting QEMU and looking at its process.

use std::fmt;
use std::fs::{self, File};
use std::io::stderr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use agent::PORT;
use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use regex::Regex;

use crate::coverage::Coverage;
use crate::daemon::Daemon;
use crate::device::{Device, Offer, vhost_user_balloon};
use crate::size::Size;
use crate::stopwatch::Stopwatch;
use crate::write_log::WriteLog;

/// The child's file descriptors of the machine protocol and of the agent's port.
const QMP_FD: i32 = 3;
const AGENT_FD: i32 = 4;

/// The guests' kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// As fast as a distribution's.
    Test,
    /// Finds what the other one survives, and is many times slower.
    Debug,
    /// Debian's own, with the module from the package.
    Debian,
    /// Finds accesses to memory that race with each other.
    Kcsan,
    /// Measures for how long interrupts, or preemption, are off.
    Latency,
    /// The test kernel for arm64.
    Arm64,
    /// The same with pages of 64 KiB.
    Arm64LargePages,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Test,
        Self::Debug,
        Self::Debian,
        Self::Kcsan,
        Self::Latency,
        Self::Arm64,
        Self::Arm64LargePages,
    ];

    /// What it runs on.
    pub fn architecture(self) -> Architecture {
        match self {
            Self::Test | Self::Debug | Self::Debian | Self::Kcsan | Self::Latency => {
                Architecture::X86_64
            }
            Self::Arm64 | Self::Arm64LargePages => Architecture::Arm64,
        }
    }

    /// The size of its pages.
    pub fn page_size(self) -> Size {
        match self {
            Self::Arm64LargePages => Size::kib(64),
            _ => Size::kib(4),
        }
    }

    /// Whether it looks for faults, which takes many times as long as to do without.
    pub fn is_slow(self) -> bool {
        match self {
            Self::Test | Self::Debian | Self::Latency | Self::Arm64 | Self::Arm64LargePages => {
                false
            }
            Self::Debug | Self::Kcsan => true,
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Test => "test",
            Self::Debug => "debug",
            Self::Debian => "debian",
            Self::Kcsan => "kcsan",
            Self::Latency => "latency",
            Self::Arm64 => "arm64",
            Self::Arm64LargePages => "arm64-64k",
        })
    }
}

/// What a kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// What the host is, too.
    X86_64,
    /// What QEMU has to translate.
    Arm64,
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// Which kernel it is.
    pub kernel: Kernel,
    /// The kernel's image.
    pub image: PathBuf,
    /// QEMU's program for the kernel's architecture.
    pub qemu: PathBuf,
    /// The initramfs with the agent, the tools and the modules.
    pub initramfs: PathBuf,
    /// The directory of the host's programs: the vhost-user device and its client.
    pub tools: PathBuf,
    /// The directory that gets a directory of logs for each guest.
    pub logs: PathBuf,
    /// Where to put what the driver counts, if it is built for that.
    pub coverage: Option<Coverage>,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// KVM where the processor says that it can; /dev/kvm alone may exist and still not run a
    /// kernel.
    pub fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let virtualises = cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .flat_map(str::split_whitespace)
            .any(|flag| flag == "vmx" || flag == "svm");
        if virtualises && Path::new("/dev/kvm").exists() {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// A PC with PCI Express.
    Q35,
    /// An older PC, with PCI. Only there does QEMU's firmware switch ACPI on again after a sleep, without
    /// which the guest can neither sleep again nor switch itself off. It has one processor: under emulation
    /// another one does not always come up again after a sleep.
    I440fx,
    /// A machine without PCI, whose virtio devices, the balloon too, are on virtio-mmio.
    Microvm,
    /// QEMU's own board for arm64, with PCI Express and without ACPI.
    Virt,
}

/// What holds the guest's memory in the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryBackend {
    /// Private anonymous memory, or a shared memory file if the balloon is a vhost-user device.
    Anonymous,
    /// A shared memory file, as a vhost-user device needs it.
    Memfd,
    /// A shared memory file of huge pages of 2 MiB.
    Hugetlb,
}

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Balloon {
    /// The one that the rest of the configuration describes.
    Default,
    /// Another one of QEMU's, or none.
    Other(Option<String>),
}

/// What guest to boot. The default is a q35 machine, or for arm64 a virt machine, with two processors, 1 GiB of memory
/// and QEMU's balloon on PCI with the id `balloon0`.
#[derive(Clone, Debug)]
pub struct Config {
    pub(crate) artifacts: Artifacts,
    pub(crate) name: String,
    pub(crate) memory: Size,
    pub(crate) target: Size,
    pub(crate) expected: Vec<Regex>,
    pub(crate) device: Device,
    pub(crate) daemon: Option<Arc<Daemon>>,
    pub(crate) offers: Vec<Offer>,
    pub(crate) daemon_arguments: Vec<String>,
    pub(crate) daemon_defaults: bool,
    verbose: bool,
    accel: Accel,
    backend: MemoryBackend,
    pub(crate) memory_file: Option<PathBuf>,
    machine: Machine,
    cpus: u32,
    nodes: u32,
    parameters: Vec<String>,
    balloon: Balloon,
    devices: Vec<String>,
    arguments: Vec<String>,
    reboots: bool,
    zeroing: bool,
}

impl Config {
    /// The default guest. Its logs go to the directory `name` under the artifacts' logs.
    pub fn new(artifacts: &Artifacts, name: &str) -> Self {
        Self {
            artifacts: artifacts.clone(),
            name: name.to_owned(),
            memory: Size::gib(1),
            target: Size::default(),
            expected: Vec::new(),
            device: Device::Qemu,
            daemon: None,
            offers: Vec::new(),
            daemon_arguments: Vec::new(),
            daemon_defaults: false,
            verbose: false,
            accel: Accel::detect(),
            backend: MemoryBackend::Anonymous,
            memory_file: None,
            machine: match artifacts.kernel.architecture() {
                Architecture::X86_64 => Machine::Q35,
                Architecture::Arm64 => Machine::Virt,
            },
            cpus: 2,
            nodes: 1,
            parameters: Vec::new(),
            balloon: Balloon::Default,
            devices: Vec::new(),
            arguments: Vec::new(),
            reboots: false,
            zeroing: false,
        }
    }

    /// How much memory the guest has.
    pub fn memory(mut self, memory: Size) -> Self {
        self.memory = memory;
        self
    }

    /// How many NUMA nodes the guest has, each with its share of the memory and of the processors.
    pub fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    /// What the balloon is asked for before the guest boots.
    pub fn target(mut self, target: Size) -> Self {
        self.target = target;
        self
    }

    /// What holds the guest's memory in the host.
    pub fn backend(mut self, backend: MemoryBackend) -> Self {
        self.backend = backend;
        self
    }

    /// Holds the guest's memory in this file, whatever the backend. QEMU makes it if it is not there.
    pub fn memory_file(mut self, file: &Path) -> Self {
        self.memory_file = Some(file.to_owned());
        self
    }

    /// A pattern for lines of the log that begin with a fault which is meant to happen.
    pub fn expect(mut self, pattern: &str) -> Self {
        self.expected
            .push(Regex::new(pattern).expect("a scenario's pattern is valid"));
        self
    }

    /// What runs the guest's instructions.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Whether the guest's log is also written to the standard error while it runs.
    pub fn verbose(mut self, verbose: bool) -> Self {
        self.verbose = verbose;
        self
    }

    /// The board.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        if machine == Machine::I440fx {
            self.cpus = 1;
        }
        self
    }

    /// How many processors the guest has.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// One more parameter on the kernel's command line.
    pub fn parameter(mut self, parameter: &str) -> Self {
        self.parameters.push(parameter.to_owned());
        self
    }

    /// Whose balloon device the guest has, unless [`Config::balloon`] says more.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Gives the guest, which has a device of a daemon, that of one that is running already.
    pub fn daemon(mut self, daemon: &Arc<Daemon>) -> Self {
        self.daemon = Some(Arc::clone(daemon));
        self
    }

    /// What the balloon device offers.
    pub fn offer(mut self, offers: &[Offer]) -> Self {
        self.offers.extend_from_slice(offers);
        self
    }

    /// One more argument for the program of the vhost-user device.
    pub fn daemon_argument(mut self, argument: &str) -> Self {
        self.daemon_arguments.push(argument.to_owned());
        self
    }

    /// Leaves the features, the floor and the boot grace of the vhost-user device at the program's own defaults. Else
    /// the features are what [`Config::offer`] says, and the daemon has no floor of its own.
    pub fn daemon_defaults(mut self) -> Self {
        self.daemon_defaults = true;
        self
    }

    /// A balloon device of QEMU's in its words, or none.
    pub fn balloon(mut self, device: Option<&str>) -> Self {
        self.balloon = Balloon::Other(device.map(str::to_owned));
        self
    }

    /// Whether the guest's balloon is the daemon's.
    pub(crate) fn has_daemon(&self) -> bool {
        self.device != Device::Qemu && self.balloon == Balloon::Default
    }

    /// The balloon device for the command line; `daemon` is the socket of a daemon that has it.
    fn balloon_device(&self, daemon: Option<&Path>) -> Option<String> {
        if let Balloon::Other(device) = &self.balloon {
            return device.clone();
        }
        let bus = match self.machine {
            Machine::Q35 | Machine::I440fx | Machine::Virt => "pci",
            Machine::Microvm => "device",
        };
        if daemon.is_some() {
            return Some(vhost_user_balloon(bus, "balloon", &self.device.properties()).to_string());
        }
        let properties = self.offers.iter().map(|offer| offer.property());
        Some(
            std::iter::once(format!(
                "virtio-balloon-{bus},id=balloon0,iothread=iothread0"
            ))
            .chain(properties.map(str::to_owned))
            .collect::<Vec<_>>()
            .join(","),
        )
    }

    /// One more device, before the balloon.
    pub fn extra_device(mut self, device: &str) -> Self {
        self.devices.push(device.to_owned());
        self
    }

    /// One more disk, which is in `file`.
    pub fn disk(self, file: &Path) -> Self {
        self.drive(file, "")
    }

    /// One more disk that cannot be written to, so that other guests may have it as well.
    pub fn read_only_disk(self, file: &Path) -> Self {
        self.drive(file, ",readonly=on")
    }

    fn drive(self, file: &Path, properties: &str) -> Self {
        let id = format!("disk{}", self.devices.len());
        let drive = format!(
            "if=none,id={id},format=raw,file={}{properties}",
            file.display()
        );
        self.argument("-drive", &drive)
            .extra_device(&format!("virtio-blk-pci,drive={id}"))
    }

    /// Records which pages the guest writes. It is slower then.
    pub fn write_log(self, log: &WriteLog) -> Self {
        let plugin = self.tool("libwrite_log.so");
        let value = format!("{},log={}", plugin.display(), log.path().display());
        self.argument("-plugin", &value)
    }

    /// Has QEMU go on when the guest reboots, in place of ending.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Whether the guest's kernel zeroes memory that it allocates if that is its default, as it is for those of
    /// distributions. It would hide what ballooning itself costs.
    pub fn zeroing(mut self, zeroing: bool) -> Self {
        self.zeroing = zeroing;
        self
    }

    /// Takes all of the guest's memory from the host at once, whether the guest uses it or not.
    pub fn preallocated(mut self) -> Self {
        self.arguments.push("-mem-prealloc".to_owned());
        self
    }

    /// One more option of QEMU with its value.
    pub fn argument(mut self, option: &str, value: &str) -> Self {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// The same for another part of the guest's life, with logs of its own.
    pub(crate) fn part(mut self, name: &str) -> Self {
        self.name = format!("{}/{name}", self.name);
        self
    }

    /// One of the host's programs.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.artifacts.tools.join(name)
    }

    /// The directory of the guest's logs.
    pub fn logs(&self) -> PathBuf {
        self.artifacts.logs.join(&self.name)
    }

    fn command_line(&self, daemon: Option<&Path>) -> Vec<String> {
        let mut line: Vec<String> = Vec::new();
        let mut option = |option: &str, value: String| line.extend([option.to_owned(), value]);

        let (machine, channel) = match self.machine {
            Machine::Q35 => ("q35", "virtio-serial-pci"),
            Machine::I440fx => ("pc", "virtio-serial-pci"),
            // The kernel needs the timer to measure its clock with, and looks for it only where
            // there is no ACPI.
            Machine::Microvm => ("microvm,acpi=off,pit=on,rtc=on", "virtio-serial-device"),
            Machine::Virt => ("virt", "virtio-serial-pci"),
        };
        let architecture = self.artifacts.kernel.architecture();
        let accel = match architecture {
            Architecture::X86_64 => self.accel,
            Architecture::Arm64 => Accel::Tcg,
        };
        let mut machine = format!("{machine},accel={}", accel.name());
        let backend = match (&self.memory_file, self.backend) {
            (Some(file), _) => Some(format!("file,mem-path={}", file.display())),
            (None, MemoryBackend::Anonymous) if daemon.is_none() => None,
            (None, MemoryBackend::Anonymous | MemoryBackend::Memfd) => Some("memfd".to_owned()),
            (None, MemoryBackend::Hugetlb) => Some("memfd,hugetlb=on,hugetlbsize=2M".to_owned()),
        };
        let bytes = self.memory.as_bytes();
        if self.nodes > 1 {
            let backend = backend.map_or("ram".to_owned(), |backend| backend + ",share=on");
            let (size, cpus) = (bytes / u64::from(self.nodes), self.cpus / self.nodes);
            for node in 0..self.nodes {
                let (first, last) = (node * cpus, (node + 1) * cpus - 1);
                option(
                    "-object",
                    format!("memory-backend-{backend},id=memory{node},size={size}"),
                );
                option(
                    "-numa",
                    format!("node,nodeid={node},cpus={first}-{last},memdev=memory{node}"),
                );
            }
        } else if let Some(backend) = backend {
            machine += ",memory-backend=memory";
            option(
                "-object",
                format!("memory-backend-{backend},id=memory,size={bytes},share=on"),
            );
        }
        option("-machine", machine);
        option("-cpu", "max".to_owned());
        // The processors of a node share caches, those of different nodes do not.
        option("-smp", format!("{},sockets={}", self.cpus, self.nodes));
        option("-m", format!("{bytes}B"));
        option("-display", "none".to_owned());
        option("-run-with", "exit-with-parent=on".to_owned());

        option("-kernel", self.artifacts.image.display().to_string());
        option("-initrd", self.artifacts.initramfs.display().to_string());
        let mut parameters = vec!["panic=-1", "sysctl.kernel.hung_task_timeout_secs=30"];
        parameters.extend_from_slice(match architecture {
            Architecture::X86_64 => &[
                // With five levels of page tables, which QEMU's own processor has, KASAN takes the kernel's
                // memory for none while the kernel identifies the processor, if an interrupt comes just then.
                "no5lvl",
                // The kernel panics if its timer does not interrupt it within ten ticks. On a busy machine QEMU may get
                // no processor for so long.
                "no_timer_check",
                "console=ttyS0",
                // How a machine without ACPI and without a keyboard's controller ends.
                "reboot=triple",
            ],
            Architecture::Arm64 => &["console=ttyAMA0"],
        });
        if !self.zeroing {
            parameters.push("init_on_alloc=0");
        }
        parameters.extend(self.parameters.iter().map(String::as_str));
        option("-append", parameters.join(" "));

        let console = self.console();
        option(
            "-chardev",
            if self.verbose {
                format!(
                    "stdio,id=console,signal=off,logfile={},logappend=on",
                    console.display()
                )
            } else {
                format!("file,id=console,path={},append=on", console.display())
            },
        );
        option("-serial", "chardev:console".to_owned());
        option("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
        option("-mon", "chardev=qmp,mode=control".to_owned());
        option("-chardev", format!("socket,id=agent,fd={AGENT_FD}"));
        option("-device", channel.to_owned());
        option(
            "-device",
            format!("virtserialport,chardev=agent,name={PORT}"),
        );
        option("-object", "iothread,id=iothread0".to_owned());
        if let Some(socket) = daemon {
            option(
                "-chardev",
                format!("socket,id=balloon,path={}", socket.display()),
            );
        }
        for device in self
            .devices
            .iter()
            .cloned()
            .chain(self.balloon_device(daemon))
        {
            option("-device", device);
        }
        line.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
        if !self.reboots {
            line.push("-no-reboot".to_owned());
        }
        line.extend(self.arguments.iter().cloned());
        line
    }

    pub(crate) fn console(&self) -> PathBuf {
        self.logs().join("console.log")
    }

    fn messages(&self) -> PathBuf {
        self.logs().join("qemu.log")
    }

    /// Begins the logs anew. Every QEMU that the guest is in writes to the end of them.
    pub(crate) fn clear_logs(&self) -> Result<()> {
        let logs = self.logs();
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        fs::write(self.console(), "")?;
        fs::write(self.messages(), "")?;
        Ok(())
    }
}

/// A running QEMU. It is killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Mutex<Child>,
    messages: PathBuf,
}

/// The host's ends of the streams into a QEMU.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) qmp: UnixStream,
    pub(crate) agent: UnixStream,
}

impl Qemu {
    /// Starts it; `daemon` is the socket of the daemon that has the balloon, if there is one.
    pub(crate) fn start(config: &Config, daemon: Option<&Path>) -> Result<(Self, Streams)> {
        let messages = config.messages();
        let (qmp, qmp_end) = UnixStream::pair()?;
        let (agent, agent_end) = UnixStream::pair()?;

        let program = &config.artifacts.qemu;
        let mut command = Command::new(program);
        command
            .args(config.command_line(daemon))
            .stdin(Stdio::null())
            .stdout(if config.verbose {
                stderr().into()
            } else {
                Stdio::null()
            })
            .stderr(File::options().append(true).open(&messages)?)
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: OwnedFd::from(qmp_end),
                    child_fd: QMP_FD,
                },
                FdMapping {
                    parent_fd: OwnedFd::from(agent_end),
                    child_fd: AGENT_FD,
                },
            ])?;
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let qemu = Self {
            child: Mutex::new(child),
            messages,
        };
        Ok((qemu, Streams { qmp, agent }))
    }

    /// Waits for QEMU to end by itself, and says whether it did.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<bool> {
        let stopwatch = Stopwatch::start(self.id());
        while !stopwatch.has_passed(timeout) {
            if let Some(status) = self.child().try_wait()? {
                if !status.success() {
                    bail!("QEMU failed: {}", self.complaint());
                }
                return Ok(true);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(false)
    }

    /// What QEMU said before it ended.
    pub(crate) fn complaint(&self) -> String {
        let messages = fs::read_to_string(&self.messages).unwrap_or_default();
        messages
            .lines()
            .last()
            .unwrap_or("it gave no reason")
            .to_owned()
    }

    /// How much of the host's memory QEMU has in use.
    pub(crate) fn resident(&self) -> Result<Size> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(Size::kib(kib.context("QEMU has ended")?.parse()?))
    }

    /// How much of the mapping that has just the size of the guest's `memory` is in transparent huge pages.
    pub(crate) fn transparent_huge_pages(&self, memory: Size) -> Result<Size> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.id()))?;
        let value = |line: &str, name: &str| -> Option<Size> {
            let kib = line.strip_prefix(name)?.split_whitespace().next()?;
            Some(Size::kib(kib.parse().ok()?))
        };
        smaps
            .lines()
            .skip_while(|line| value(line, "Size:") != Some(memory))
            .find_map(|line| value(line, "AnonHugePages:"))
            .context("QEMU has no mapping of the guest's memory")
    }

    /// The number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child().id()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect("a lock")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        config_for(Kernel::Test)
    }

    fn config_for(kernel: Kernel) -> Config {
        let artifacts = Artifacts {
            kernel,
            image: "k".into(),
            qemu: "q".into(),
            initramfs: "i".into(),
            tools: "t".into(),
            logs: "/logs".into(),
            coverage: None,
        };
        Config::new(&artifacts, "name").accel(Accel::Tcg)
    }

    #[test]
    fn defaults_are_a_pc_with_a_balloon() {
        let line = config().command_line(None).join(" ");
        assert!(
            line.contains("-machine q35,accel=tcg -cpu max -smp 2,sockets=1 -m 1073741824B"),
            "{line}"
        );
        assert!(line.contains("virtio-balloon-pci,id=balloon0"), "{line}");
        assert!(line.contains("path=/logs/name/console.log"), "{line}");
    }

    #[test]
    fn a_microvm_has_no_pci() {
        let line = config()
            .machine(Machine::Microvm)
            .command_line(None)
            .join(" ");
        assert!(line.contains("-device virtio-balloon-device"), "{line}");
        assert!(!line.contains("pci"), "{line}");
    }

    #[test]
    fn another_architecture_is_translated() {
        let line = config_for(Kernel::Arm64)
            .accel(Accel::Kvm)
            .command_line(None)
            .join(" ");
        assert!(line.contains("-machine virt,accel=tcg "), "{line}");
        assert!(line.contains("console=ttyAMA0"), "{line}");
        assert!(line.contains("virtio-balloon-pci,id=balloon0"), "{line}");
    }

    #[test]
    fn offers_are_properties() {
        let line = config()
            .offer(&[Offer::FreePageHint, Offer::PagePoison])
            .command_line(None)
            .join(" ");
        let device =
            "virtio-balloon-pci,id=balloon0,iothread=iothread0,free-page-hint=on,page-poison=on";
        assert!(line.contains(device), "{line}");
    }

    #[test]
    fn a_daemon_shares_the_memory() {
        let line = config()
            .device(Device::Extended)
            .command_line(Some(Path::new("/s")))
            .join(" ");
        for part in [
            "share=on",
            "path=/s",
            r#""chardev":"balloon""#,
            r#""num_vqs":6"#,
            r#""config_size":24"#,
        ] {
            assert!(line.contains(part), "{line}");
        }
        assert!(!line.contains("-device virtio-balloon"), "{line}");
    }

    #[test]
    fn memory_comes_from_its_backend() {
        let line = config()
            .backend(MemoryBackend::Hugetlb)
            .command_line(None)
            .join(" ");
        assert!(line.contains("accel=tcg,memory-backend=memory"), "{line}");
        assert!(
            line.contains(
                "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,id=memory,size=1073741824,share=on"
            ),
            "{line}"
        );
        let line = config()
            .memory_file(Path::new("/m"))
            .command_line(None)
            .join(" ");
        assert!(line.contains("memory-backend-file,mem-path=/m,"), "{line}");
    }

    #[test]
    fn nodes_share_the_memory() {
        let line = config().nodes(2).command_line(None).join(" ");
        for part in [
            "memory-backend-ram,id=memory1,size=536870912",
            "node,nodeid=1,cpus=1-1,memdev=memory1",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn a_balloon_can_be_left_out() {
        let line = config().balloon(None).command_line(None).join(" ");
        assert!(!line.contains("virtio-balloon-pci"), "{line}");
    }
}
