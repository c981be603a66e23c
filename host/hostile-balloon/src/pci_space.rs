// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the registers of the PCI device are, the PCI configuration space that says so, and what QEMU must know.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{IrqInfo, ServerRegion};

use crate::plan::{Flaw, Plan};

/// Where the parts of the BAR are, and how long it is, in bytes.
pub(crate) const STATUS: u64 = 0x1000;
pub(crate) const DEVICE_CONFIG: u64 = 0x2000;
pub(crate) const NOTIFICATIONS: u64 = 0x3000;
pub(crate) const REGISTERS: u64 = 0x4000;

/// The length of the common configuration.
pub(crate) const COMMON: usize = 64;

/// The outer form of a device.
pub(crate) struct Shape {
    pub(crate) flaw: Option<Flaw>,
    /// The length of its own configuration space, in bytes.
    pub(crate) config_size: usize,
    /// How many entries each queue has.
    pub(crate) sizes: Vec<u16>,
}

impl From<&Plan> for Shape {
    fn from(plan: &Plan) -> Self {
        let size = match plan.flaw {
            Some(Flaw::OddEntries) => 3,
            _ => plan.properties.vq_size,
        };
        Self {
            flaw: plan.flaw,
            config_size: plan.properties.config_size,
            sizes: vec![size; plan.properties.num_vqs],
        }
    }
}

/// The PCI configuration space of a device of this shape.
pub(crate) fn space(shape: &Shape) -> [u8; 256] {
    /// Red Hat's vendor id, the first device id of a virtio device, and how far from it a balloon's is (clause 5).
    const VENDOR: u32 = 0x1af4;
    const DEVICES: u32 = 0x1040;
    const BALLOON: u32 = 5;
    /// The class of devices that are in no other class, and the status of one with capabilities.
    const OTHERS: u32 = 0xff << 24;
    const CAPABILITIES: u32 = 1 << 20;
    /// The id of a capability for what a vendor likes.
    const VENDORS_OWN: u8 = 0x09;
    /// Where the first capability is.
    const FIRST: u8 = 0x40;

    let config_size = u32::try_from(shape.config_size).unwrap_or(0);
    // Each begins with its id, a place for where the next one is, its length and its kind (clause 4.1.4).
    let part = |kind: u32, offset: u64, length: u32| {
        let first = u32::from(VENDORS_OWN) | (16 << 16) | (kind << 24);
        [first, 0, u32::try_from(offset).unwrap_or(0), length, 0]
    };
    let capabilities = [
        part(1, 0, u32::try_from(COMMON).unwrap_or(0)),
        part(2, NOTIFICATIONS, 0x1000),
        part(3, STATUS, 4),
        match shape.flaw {
            // A kind that there is none of.
            Some(Flaw::HiddenConfig) => part(0xff, DEVICE_CONFIG, config_size),
            Some(Flaw::ConfigBeyondEnd) => part(4, REGISTERS - 4, config_size),
            _ => part(4, DEVICE_CONFIG, config_size),
        },
    ];

    let mut words = [0_u32; 64];
    words[0] = VENDOR | ((DEVICES + BALLOON) << 16);
    words[1] = CAPABILITIES;
    words[2] = OTHERS | 1;
    words[11] = VENDOR;
    words[13] = FIRST.into();
    // The pin that it interrupts by: INTA, or none.
    words[15] = u32::from(shape.flaw != Some(Flaw::NoInterrupts)) << 8;
    let mut place = usize::from(FIRST) / 4;
    for (number, capability) in capabilities.iter().enumerate() {
        for (word, value) in words.iter_mut().skip(place).zip(capability) {
            *word = *value;
        }
        place += capability.len();
        if number + 1 < capabilities.len() {
            let next = u32::try_from(4 * place).unwrap_or(0);
            words[place - capability.len()] |= next << 8;
        }
    }
    let mut space = [0; 256];
    for (bytes, word) in space.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    space
}

/// The description of the device's regions for QEMU.
pub(crate) fn regions() -> Vec<ServerRegion> {
    let region = |index| {
        let size = match index {
            VFIO_PCI_CONFIG_REGION_INDEX => 256,
            VFIO_PCI_BAR0_REGION_INDEX => REGISTERS,
            _ => 0,
        };
        ServerRegion {
            region_info: vfio_region_info {
                argsz: u32::try_from(size_of::<vfio_region_info>()).unwrap_or(0),
                flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
                index,
                size,
                ..vfio_region_info::default()
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

/// The description of the device's interrupts for QEMU.
pub(crate) fn interrupts() -> Vec<IrqInfo> {
    let interrupt = |index| IrqInfo {
        index,
        flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
        count: u32::from(index == VFIO_PCI_INTX_IRQ_INDEX),
    };
    (0..VFIO_PCI_NUM_IRQS).map(interrupt).collect()
}
