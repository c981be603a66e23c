// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration of a guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::container::System;
use crate::coverage::Coverage;
use crate::daemon::Daemon;
use crate::device::{Device, Offer};
use crate::machine::{Accel, Kernel, Machine, MemoryBackend};
use crate::size::Size;
use crate::write_log::WriteLog;

pub(crate) mod command_line;

/// The files of a guest.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The kind of kernel.
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
    /// The directory for coverage counters, if the driver is built with them.
    pub coverage: Option<Coverage>,
    /// A Debian system with systemd in which the packages are installed, if there is one.
    pub system: Option<System>,
}

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Balloon {
    /// The device that the rest of the configuration describes.
    Default,
    /// Another one of QEMU's, or none.
    Other(Option<String>),
}

/// Whether a guest's kernel zeroes memory that it allocates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Zeroing {
    /// It does not. Zeroing would hide the cost of ballooning itself.
    #[default]
    Off,
    /// It does.
    On,
    /// It does if that is its default, as in distributions' kernels.
    Own,
}

impl Zeroing {
    /// The kernel's parameter for it.
    pub fn parameter(self) -> Option<&'static str> {
        match self {
            Self::Off => Some("init_on_alloc=0"),
            Self::On => Some("init_on_alloc=1"),
            Self::Own => None,
        }
    }
}

/// The configuration of a guest. The default is a q35 machine, or the board of another architecture, with two processors,
/// 1 GiB of memory and QEMU's balloon on PCI with the id `balloon0`.
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
    pub(crate) verbose: bool,
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
    zeroing: Zeroing,
    /// How often the host looks at the size of the balloon, if not as often as is usual for the device.
    pub(crate) polling: Option<Duration>,
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
            machine: artifacts
                .kernel
                .foreign()
                .map_or(Machine::Q35, Machine::Foreign),
            cpus: 2,
            nodes: 1,
            parameters: Vec::new(),
            balloon: Balloon::Default,
            devices: Vec::new(),
            arguments: Vec::new(),
            reboots: false,
            zeroing: Zeroing::default(),
            polling: None,
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

    /// Whether QEMU can migrate the guest without losing what it writes: see `Migration::finish`.
    pub(crate) fn migrates(&self) -> bool {
        self.nodes == 1 || self.accel == Accel::Kvm
    }

    /// The target that is set before the guest boots.
    pub fn target(mut self, target: Size) -> Self {
        self.target = target;
        self
    }

    /// The backend of the guest's memory in the host.
    pub fn backend(mut self, backend: MemoryBackend) -> Self {
        self.backend = backend;
        self
    }

    /// Holds the guest's memory in this file, whatever the backend. QEMU creates the file if it
    /// does not exist.
    pub fn memory_file(mut self, file: &Path) -> Self {
        self.memory_file = Some(file.to_owned());
        self
    }

    /// A pattern for the first lines of expected faults in the log.
    pub fn expect(mut self, pattern: &str) -> Self {
        self.expected
            .push(Regex::new(pattern).expect("a scenario's pattern is valid"));
        self
    }

    /// The accelerator.
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

    /// The guest's balloon device, unless [`Config::balloon`] overrides it.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Connects the guest's vhost-user device to a running daemon.
    pub fn daemon(mut self, daemon: &Arc<Daemon>) -> Self {
        self.daemon = Some(Arc::clone(daemon));
        self
    }

    /// The features that the balloon device offers.
    pub fn offer(mut self, offers: &[Offer]) -> Self {
        self.offers.extend_from_slice(offers);
        self
    }

    /// One more argument for the program of the vhost-user device.
    pub fn daemon_argument(mut self, argument: &str) -> Self {
        self.daemon_arguments.push(argument.to_owned());
        self
    }

    /// Uses the daemon's own defaults for features, floor and boot grace. Otherwise [`Config::offer`] sets the
    /// features, and the daemon has no floor.
    pub fn daemon_defaults(mut self) -> Self {
        self.daemon_defaults = true;
        self
    }

    /// A balloon device of QEMU, by its QEMU options, or none.
    pub fn balloon(mut self, device: Option<&str>) -> Self {
        self.balloon = Balloon::Other(device.map(str::to_owned));
        self
    }

    /// Whether the daemon implements the guest's balloon.
    pub(crate) fn has_daemon(&self) -> bool {
        self.device != Device::Qemu && self.balloon == Balloon::Default
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

    /// One more read-only disk, which guests may share.
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

    /// Records which pages the guest writes. This slows down the guest.
    pub fn write_log(self, log: &WriteLog) -> Self {
        let plugin = self.tool("libwrite_log.so");
        let value = format!("{},log={}", plugin.display(), log.path().display());
        self.argument("-plugin", &value)
    }

    /// Puts the Debian system into the guest's memory, for [`Guest::boot_system`](crate::Guest::boot_system). The
    /// guest's initramfs is then in `file`.
    ///
    /// # Errors
    ///
    /// There is no system, or it cannot be read.
    pub fn with_system(mut self, file: &Path) -> Result<Self> {
        let system = self.artifacts.system.as_ref();
        let system = system.context("there is no system with systemd")?;
        fs::copy(&self.artifacts.initramfs, file)?;
        system.append_to(file)?;
        self.artifacts.initramfs = file.to_owned();
        Ok(self)
    }

    /// Looks at the size of the balloon, or of the virtio-mem device, at this interval. Otherwise it depends on the
    /// device.
    pub fn polling(mut self, interval: Duration) -> Self {
        self.polling = Some(interval);
        self
    }

    /// Lets QEMU continue when the guest reboots, instead of ending.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Whether the guest's kernel zeroes memory that it allocates.
    pub fn zeroing(mut self, zeroing: Zeroing) -> Self {
        self.zeroing = zeroing;
        self
    }

    /// Allocates all of the guest's memory in the host at once, whether the guest uses it or not.
    pub fn preallocated(mut self) -> Self {
        self.arguments.push("-mem-prealloc".to_owned());
        self
    }

    /// One more option of QEMU with its value.
    pub fn argument(mut self, option: &str, value: &str) -> Self {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// The same with this after its name.
    pub fn name_suffix(mut self, suffix: &str) -> Self {
        self.name += suffix;
        self
    }

    /// The same for another part of the guest's life, with logs of its own.
    pub(crate) fn part(mut self, name: &str) -> Self {
        self.name = format!("{}/{name}", self.name);
        self
    }

    /// Starts a daemon for this guest.
    pub fn start_daemon(&self) -> Result<Daemon> {
        let program = self.tool("vhost-user-balloon");
        Daemon::start(&program, &self.logs(), &self.arguments_of_daemon())
    }

    /// Starts a daemon for this guest as a service, which can be restarted while the guest runs: the unit of the package
    /// under systemd if there is a system that has both.
    pub fn start_daemon_service(&self) -> Result<Daemon> {
        let arguments = self.arguments_of_daemon();
        match &self.artifacts.system {
            Some(system) => Daemon::start_unit(system, &self.logs(), &arguments),
            None => {
                let program = self.tool("vhost-user-balloon");
                Daemon::start_service(&program, &self.logs(), &arguments)
            }
        }
    }

    fn arguments_of_daemon(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.device == Device::Extended {
            arguments.push("--extensions".to_owned());
        }
        if !self.daemon_defaults {
            let mut features = vec!["stats", "event-idx"];
            features.extend(self.offers.iter().map(|offer| offer.feature()));
            arguments.extend(["--features".to_owned(), features.join(",")]);
            // Most tests are about the driver, not the daemon's policy.
            arguments.extend(["--floor", "0", "--boot-grace", "0"].map(str::to_owned));
        }
        // These override earlier options.
        arguments.extend_from_slice(&self.daemon_arguments);
        arguments
    }

    /// One of the host's programs.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.artifacts.tools.join(name)
    }

    /// The directory of the guest's logs.
    pub fn logs(&self) -> PathBuf {
        self.artifacts.logs.join(&self.name)
    }

    pub(crate) fn console(&self) -> PathBuf {
        self.logs().join("console.log")
    }

    pub(crate) fn messages(&self) -> PathBuf {
        self.logs().join("qemu.log")
    }

    /// Empties the logs. Every QEMU of the guest appends to them.
    pub(crate) fn clear_logs(&self) -> Result<()> {
        let logs = self.logs();
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        fs::write(self.console(), "")?;
        fs::write(self.messages(), "")?;
        Ok(())
    }
}
