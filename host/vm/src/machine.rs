// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel and board of a guest.

use std::fs;
use std::path::Path;

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

use crate::architecture::{ARM64, Architecture, LOONGARCH64, POWERPC64LE, RISCV64, S390X};
use crate::size::Size;

/// The guests' kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Kernel {
    /// With KASAN, lockdep and kmemleak, and many times slower.
    Debug,
    /// As fast as a distribution's.
    Test,
    /// Debian's own, with the module from the package.
    Debian,
    /// With KCSAN, which finds data races.
    Kcsan,
    /// With tracers for the time with interrupts or preemption off.
    Latency,
    /// With kCFI, which checks the types of callbacks.
    Kcfi,
    /// The test kernel for arm64.
    Arm64,
    /// The same with pages of 16 KiB.
    #[strum(serialize = "arm64-16k")]
    Arm64Pages16k,
    /// The same with pages of 64 KiB.
    #[strum(serialize = "arm64-64k")]
    Arm64Pages64k,
    /// The test kernel for riscv64.
    Riscv64,
    /// The test kernel for s390x, which is big-endian.
    S390x,
    /// The test kernel for powerpc64le, with pages of 64 KiB.
    Powerpc64le,
    /// The test kernel for loongarch64, with pages of 16 KiB.
    Loongarch64,
}

impl Kernel {
    /// All of them, in the order in which their tests run. KUnit in the debug kernel takes longest, and mostly waits: so it
    /// runs next to the build of the test kernel.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Its name, also on the command line.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Its architecture, unless that is the host's.
    pub fn foreign(self) -> Option<&'static Architecture> {
        match self {
            Self::Test | Self::Debug | Self::Debian | Self::Kcsan | Self::Latency | Self::Kcfi => {
                None
            }
            Self::Arm64 | Self::Arm64Pages16k | Self::Arm64Pages64k => Some(&ARM64),
            Self::Riscv64 => Some(&RISCV64),
            Self::S390x => Some(&S390X),
            Self::Powerpc64le => Some(&POWERPC64LE),
            Self::Loongarch64 => Some(&LOONGARCH64),
        }
    }

    /// Whether a guest can run it, or only the compiler be tested.
    pub fn can_boot(self) -> bool {
        self.foreign()
            .is_none_or(|architecture| architecture.has_programs)
    }

    /// The size of its pages.
    pub fn page_size(self) -> Size {
        match self {
            Self::Arm64Pages16k | Self::Loongarch64 => Size::kib(16),
            Self::Arm64Pages64k | Self::Powerpc64le => Size::kib(64),
            _ => Size::kib(4),
        }
    }

    /// Whether it has debug checks, which make it many times slower.
    pub fn is_slow(self) -> bool {
        matches!(self, Self::Debug | Self::Kcsan)
    }
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
    /// The board of another architecture, without ACPI.
    Foreign(&'static Architecture),
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
