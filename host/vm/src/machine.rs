// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel, architecture and board of a guest.

use std::fmt;
use std::fs;
use std::path::Path;

use crate::size::Size;

/// The guests' kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// As fast as a distribution's.
    Test,
    /// With KASAN, lockdep and kmemleak, and many times slower.
    Debug,
    /// Debian's own, with the module from the package.
    Debian,
    /// With KCSAN, which finds data races.
    Kcsan,
    /// With tracers for the time with interrupts or preemption off.
    Latency,
    /// The test kernel for arm64.
    Arm64,
    /// The same with pages of 64 KiB.
    Arm64LargePages,
}

impl Kernel {
    /// All of them, in the order in which their tests run. KUnit in the debug kernel takes longest, and mostly waits: so it
    /// runs next to the build of the test kernel.
    pub const ALL: [Self; 7] = [
        Self::Debug,
        Self::Test,
        Self::Debian,
        Self::Kcsan,
        Self::Latency,
        Self::Arm64,
        Self::Arm64LargePages,
    ];

    /// Its architecture.
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

    /// Whether it has debug checks, which make it many times slower.
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

/// An architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// The host's architecture.
    X86_64,
    /// An architecture that QEMU emulates.
    Arm64,
}

/// The accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// KVM if the processor supports it. A /dev/kvm that exists may still be unable to run a
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

    pub(crate) fn name(self) -> &'static str {
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
    /// An older PC, with PCI. Only on this board QEMU's firmware enables ACPI again on resume. Without ACPI
    /// the guest can neither suspend again nor power off. It has one processor: under emulation another one
    /// does not always come online again on resume.
    I440fx,
    /// A machine without PCI, whose virtio devices, the balloon too, are on virtio-mmio.
    Microvm,
    /// QEMU's own board for arm64, with PCI Express and without ACPI.
    Virt,
}

/// The backend of the guest's memory in the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryBackend {
    /// Private anonymous memory, or a shared memory file if the balloon is a vhost-user device.
    Anonymous,
    /// A shared memory file, as a vhost-user device needs it.
    Memfd,
    /// A shared memory file of huge pages of 2 MiB.
    Hugetlb,
}
