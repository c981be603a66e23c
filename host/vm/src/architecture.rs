// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The architectures that QEMU emulates for guests.

/// An architecture, except for the host's own. What guests of the host's architecture need is in the build root, and they
/// have several boards.
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// The name, also of its kernel with the default size of pages.
    pub name: &'static str,
    /// The kernel's name for it, for `ARCH=`.
    pub linux: &'static str,
    /// The kernel's image in its build directory.
    pub image: &'static str,
    /// Debian's name for it.
    pub debian: &'static str,
    /// The Rust compiler's target for programs.
    pub rust: &'static str,
    /// The target of clang, which links programs.
    pub clang: &'static str,
    /// Whether Debian has programs for guests. Otherwise the kernel and the module are compiled only.
    pub has_programs: bool,
    /// Whether the kernel needs a newer Rust compiler than Debian's stable release has.
    pub newer_rust: bool,
    /// Debian's package with QEMU.
    pub qemu_package: &'static str,
    /// Debian's package with the board's firmware, unless QEMU has it.
    pub firmware_package: Option<&'static str>,
    /// QEMU's program.
    pub qemu: &'static str,
    /// QEMU's board.
    pub machine: &'static str,
    /// The suffix of QEMU's virtio devices for the board.
    pub bus: &'static str,
    /// Whether PCI devices of the board can interrupt by INTx. QEMU's vhost-user device has one MSI-X vector, and Linux
    /// then uses INTx for virtio.
    pub has_intx: bool,
    /// The kernel's name for the board's console.
    pub console: &'static str,
}

pub(crate) static ARM64: Architecture = Architecture {
    name: "arm64",
    linux: "arm64",
    image: "arch/arm64/boot/Image",
    debian: "arm64",
    rust: "aarch64-unknown-linux-gnu",
    clang: "aarch64-linux-gnu",
    has_programs: true,
    newer_rust: false,
    qemu_package: "qemu-system-arm",
    firmware_package: None,
    qemu: "qemu-system-aarch64",
    machine: "virt",
    bus: "pci",
    has_intx: true,
    console: "ttyAMA0",
};

pub(crate) static RISCV64: Architecture = Architecture {
    name: "riscv64",
    linux: "riscv",
    image: "arch/riscv/boot/Image",
    debian: "riscv64",
    rust: "riscv64gc-unknown-linux-gnu",
    clang: "riscv64-linux-gnu",
    has_programs: true,
    newer_rust: false,
    qemu_package: "qemu-system-riscv",
    firmware_package: Some("opensbi"),
    qemu: "qemu-system-riscv64",
    machine: "virt",
    bus: "pci",
    has_intx: true,
    console: "ttyS0",
};

/// The only big-endian one.
pub(crate) static S390X: Architecture = Architecture {
    name: "s390x",
    linux: "s390",
    image: "arch/s390/boot/bzImage",
    debian: "s390x",
    rust: "s390x-unknown-linux-gnu",
    clang: "s390x-linux-gnu",
    has_programs: true,
    newer_rust: true,
    qemu_package: "qemu-system-s390x",
    firmware_package: None,
    qemu: "qemu-system-s390x",
    machine: "s390-ccw-virtio",
    bus: "ccw",
    has_intx: false,
    console: "ttysclp0",
};

pub(crate) static POWERPC64LE: Architecture = Architecture {
    name: "powerpc64le",
    linux: "powerpc",
    image: "vmlinux",
    debian: "ppc64el",
    rust: "powerpc64le-unknown-linux-gnu",
    clang: "powerpc64le-linux-gnu",
    has_programs: true,
    newer_rust: true,
    qemu_package: "qemu-system-ppc",
    firmware_package: None,
    qemu: "qemu-system-ppc64",
    machine: "pseries",
    bus: "pci",
    has_intx: true,
    console: "hvc0",
};

pub(crate) static LOONGARCH64: Architecture = Architecture {
    name: "loongarch64",
    linux: "loongarch",
    image: "arch/loongarch/boot/vmlinux.elf",
    debian: "loong64",
    rust: "loongarch64-unknown-linux-gnu",
    clang: "loongarch64-linux-gnu",
    has_programs: false,
    newer_rust: false,
    qemu_package: "qemu-system-misc",
    firmware_package: None,
    qemu: "qemu-system-loongarch64",
    machine: "virt",
    bus: "pci",
    has_intx: true,
    console: "ttyS0",
};
