// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's command line.

use std::path::Path;

use agent::PORT;

use super::{Balloon, Config};
use crate::architecture::Architecture;
use crate::device::vhost_user_balloon;
use crate::machine::{Accel, Machine, MemoryBackend};
use crate::time_stamp_counter;

/// The child's file descriptors of the machine protocol and of the agent's port.
pub(crate) const QMP_FD: i32 = 3;
pub(crate) const AGENT_FD: i32 = 4;

/// Options with their values, in the order of the command line.
#[derive(Default)]
struct Options(Vec<String>);

impl Options {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }
}

impl Config {
    /// The options of a QEMU for this guest; `daemon` is the socket of the balloon's daemon.
    pub(crate) fn command_line(&self, daemon: Option<&Path>) -> Vec<String> {
        let mut options = Options::default();
        self.board(&mut options, daemon.is_some());
        options.add("-kernel", self.artifacts.image.display().to_string());
        options.add("-initrd", self.artifacts.initramfs.display().to_string());
        options.add("-append", self.kernel_parameters());
        self.channels(&mut options);
        self.add_devices(&mut options, daemon);

        let mut line = options.0;
        line.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
        if !self.reboots {
            line.push("-no-reboot".to_owned());
        }
        line.extend(self.arguments.iter().cloned());
        line
    }

    /// The machine with its processors and memory.
    fn board(&self, options: &mut Options, has_daemon: bool) {
        let machine = match self.machine {
            Machine::Q35 => "q35",
            Machine::I440fx => "pc",
            // The kernel calibrates its clock with the timer, and probes for the timer only without
            // ACPI.
            Machine::Microvm => "microvm,acpi=off,pit=on,rtc=on",
            Machine::Foreign(architecture) => architecture.machine,
        };
        let mut machine = format!("{machine},accel={}", self.accelerator().name());
        let backend = self.memory_backend(has_daemon);
        let bytes = self.memory.as_bytes();
        if self.nodes > 1 {
            let backend = backend.map_or("ram".to_owned(), |backend| backend + ",share=on");
            self.add_nodes(options, &backend);
        } else if let Some(backend) = backend {
            machine += ",memory-backend=memory";
            options.add(
                "-object",
                format!("memory-backend-{backend},id=memory,size={bytes},share=on"),
            );
        }
        options.add("-machine", machine);
        options.add("-cpu", "max");
        // The processors of a node share caches, those of different nodes do not.
        options.add("-smp", format!("{},sockets={}", self.cpus, self.nodes));
        options.add("-m", format!("{bytes}B"));
        options.add("-display", "none");
        options.add("-run-with", "exit-with-parent=on");
        if self.foreign().is_some() {
            // QEMU is in a directory of its own, with some firmware. The other firmware is in the build root.
            let own = self.artifacts.qemu.with_file_name("../share/qemu");
            options.add("-L", own.display().to_string());
            options.add("-L", "/usr/share/qemu");
        }
    }

    /// The guest's architecture, unless that is the host's.
    fn foreign(&self) -> Option<&'static Architecture> {
        self.artifacts.kernel.foreign()
    }

    /// The accelerator for the guest's architecture.
    fn accelerator(&self) -> Accel {
        self.foreign().map_or(self.accel, |_| Accel::Tcg)
    }

    /// The memory backend's type with its properties, if it is not QEMU's default.
    fn memory_backend(&self, has_daemon: bool) -> Option<String> {
        match (&self.memory_file, self.backend) {
            (Some(file), _) => Some(format!("file,mem-path={}", file.display())),
            (None, MemoryBackend::Anonymous) if !has_daemon => None,
            (None, MemoryBackend::Anonymous | MemoryBackend::Memfd) => Some("memfd".to_owned()),
            (None, MemoryBackend::Hugetlb) => Some("memfd,hugetlb=on,hugetlbsize=2M".to_owned()),
        }
    }

    /// NUMA nodes, each with its share of the memory and of the processors.
    fn add_nodes(&self, options: &mut Options, backend: &str) {
        let size = self.memory.as_bytes() / u64::from(self.nodes);
        let cpus = self.cpus / self.nodes;
        for node in 0..self.nodes {
            let (first, last) = (node * cpus, (node + 1) * cpus - 1);
            options.add(
                "-object",
                format!("memory-backend-{backend},id=memory{node},size={size}"),
            );
            options.add(
                "-numa",
                format!("node,nodeid={node},cpus={first}-{last},memdev=memory{node}"),
            );
        }
    }

    fn kernel_parameters(&self) -> String {
        let foreign = self.foreign();
        let console = foreign.map_or("ttyS0", |architecture| architecture.console);
        let console = format!("console={console}");
        let mut parameters = vec![
            "panic=-1",
            // The kernel takes processors and tasks that make no progress for hung, after two minutes. On a busy machine
            // QEMU may get no processor for half a minute.
            "sysctl.kernel.hung_task_timeout_secs=120",
            "watchdog_thresh=60",
            "rcupdate.rcu_cpu_stall_timeout=120",
            &console,
        ];
        if foreign.is_none() {
            parameters.extend([
                // With five levels of page tables, which QEMU's own processor supports, KASAN reports a fault
                // if an interrupt arrives while the kernel identifies the processor.
                "no5lvl",
                // The kernel panics if its timer does not interrupt it within ten ticks. On a busy machine QEMU may get
                // no processor for so long.
                "no_timer_check",
                // Linux 7.3's clocksource watchdog waits for another processor with interrupts off, until a timeout on
                // the current clocksource. Early during boot that is jiffies. Jiffies stop while both processors have
                // interrupts off: the other processor is in stop_machine().
                "tsc=nowatchdog",
                // The way to end a machine without ACPI and without a keyboard controller.
                "reboot=triple",
            ]);
        }
        parameters.extend(self.zeroing.parameter());
        // On a busy machine the kernel calibrates the counter with a timer whose interrupts are late. It then
        // calculates a fraction of the right frequency, and its clock runs several times too fast.
        let frequency = match (foreign, self.accelerator()) {
            (None, Accel::Tcg) => time_stamp_counter::khz(),
            _ => None,
        };
        let frequency = frequency.map(|khz| format!("tsc_early_khz={khz}"));
        parameters.extend(frequency.as_deref());
        parameters.extend(self.parameters.iter().map(String::as_str));
        parameters.join(" ")
    }

    /// The guest's console, the machine protocol and the agent's port.
    fn channels(&self, options: &mut Options) {
        let console = self.console();
        let (backend, file, append) = if self.verbose {
            ("stdio,id=console,signal=off", "logfile", "logappend")
        } else {
            ("file,id=console", "path", "append")
        };
        options.add(
            "-chardev",
            format!("{backend},{file}={},{append}=on", console.display()),
        );
        options.add("-serial", "chardev:console");
        options.add("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
        options.add("-mon", "chardev=qmp,mode=control");
        options.add("-chardev", format!("socket,id=agent,fd={AGENT_FD}"));
        options.add("-device", format!("virtio-serial-{}", self.bus()));
        options.add(
            "-device",
            format!("virtserialport,chardev=agent,name={PORT}"),
        );
    }

    fn add_devices(&self, options: &mut Options, daemon: Option<&Path>) {
        options.add("-object", "iothread,id=iothread0");
        if let Some(socket) = daemon {
            options.add(
                "-chardev",
                format!("socket,id=balloon,path={}", socket.display()),
            );
        }
        for device in &self.devices {
            options.add("-device", device);
        }
        if let Some(balloon) = self.balloon_device(daemon.is_some()) {
            options.add("-device", balloon);
        }
    }

    /// The suffix of the machine's virtio device names.
    fn bus(&self) -> &'static str {
        match self.machine {
            Machine::Foreign(architecture) => architecture.bus,
            _ => self.vhost_user_bus(),
        }
    }

    /// The same for a device in another process. QEMU has no such device for virtio-ccw.
    fn vhost_user_bus(&self) -> &'static str {
        match self.machine {
            Machine::Q35 | Machine::I440fx | Machine::Foreign(_) => "pci",
            Machine::Microvm => "device",
        }
    }

    fn balloon_device(&self, has_daemon: bool) -> Option<String> {
        if let Balloon::Other(device) = &self.balloon {
            return device.clone();
        }
        if has_daemon {
            let (bus, properties) = (self.vhost_user_bus(), self.device.properties());
            return Some(vhost_user_balloon(bus, "balloon", &properties).to_string());
        }
        let bus = self.bus();
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Artifacts;
    use crate::device::{Device, Offer};
    use crate::machine::Kernel;

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
            system: None,
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
    fn an_emulated_guest_need_not_measure_its_time_stamp_counter() {
        let khz = time_stamp_counter::khz().map(|khz| format!("tsc_early_khz={khz}"));
        let has_khz = |config: Config| {
            let line = config.command_line(None).join(" ");
            khz.as_ref().is_some_and(|khz| line.contains(khz))
        };
        assert_eq!(has_khz(config()), khz.is_some());
        assert!(!has_khz(config().accel(Accel::Kvm)));
        assert!(!has_khz(config_for(Kernel::Arm64)));
    }

    #[test]
    fn another_architecture_is_translated() {
        let line = config_for(Kernel::Arm64)
            .accel(Accel::Kvm)
            .using_memory()
            .command_line(None)
            .join(" ");
        assert!(line.contains("-machine virt,accel=tcg "), "{line}");
        assert!(line.contains("console=ttyAMA0"), "{line}");
        assert!(!line.contains("reboot=triple"), "{line}");
        assert!(!line.contains("erms"), "{line}");
        assert!(line.contains("virtio-balloon-pci,id=balloon0"), "{line}");
    }

    #[test]
    fn s390x_has_its_own_bus_and_pci() {
        let config = config_for(Kernel::S390x);
        let line = config.command_line(None).join(" ");
        for device in ["virtio-serial-ccw", "virtio-balloon-ccw,id=balloon0"] {
            assert!(line.contains(device), "{line}");
        }
        let line = config.command_line(Some(Path::new("/s"))).join(" ");
        assert!(line.contains("vhost-user-test-device-pci"), "{line}");
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
        for part in ["share=on", "path=/s", r#""chardev":"balloon""#] {
            assert!(line.contains(part), "{line}");
        }
        let properties = Device::Extended.properties();
        for (name, value) in properties.as_object().unwrap() {
            assert!(line.contains(&format!(r#""{name}":{value}"#)), "{line}");
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
    fn emulated_guests_migrate_with_one_node_only() {
        let config = || config().accel(Accel::Tcg);
        assert!(config().migrates());
        assert!(!config().nodes(2).migrates());
        assert!(config().nodes(2).accel(Accel::Kvm).migrates());
    }

    #[test]
    fn a_balloon_can_be_left_out() {
        let line = config().balloon(None).command_line(None).join(" ");
        assert!(!line.contains("virtio-balloon-pci"), "{line}");
    }
}
