// SPDX-License-Identifier: GPL-2.0

//! Functions that the PCI transport lacks: the length of the configuration space, and a reset that
//! does not wait forever for a removed device.
//!
//! C headers: [`include/uapi/linux/virtio_pci.h`](srctree/include/uapi/linux/virtio_pci.h),
//! [`include/linux/pci.h`](srctree/include/linux/pci.h)

use crate::rust::{
    bindings,
    virtio::bus::device::Device, //
};

#[cfg(CONFIG_PCI)]
use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
#[cfg(CONFIG_PCI)]
use kernel::{
    device,
    io::Io,
    pci, //
};
use kernel::{
    device::Bound,
    prelude::*, //
};

/// The PCI device of a virtio device.
#[cfg(CONFIG_PCI)]
struct PciDevice<'a>(&'a pci::Device<Bound>);

#[cfg(CONFIG_PCI)]
impl<'a> PciDevice<'a> {
    /// Returns the PCI device of `dev`, if there is one.
    fn of(dev: &'a Device<Bound>) -> Option<Self> {
        // SAFETY: By the type invariants the device is valid.
        let parent = NonNull::new(unsafe { (*dev.as_raw()).dev.parent })?;
        // SAFETY: A device that is bound is registered. It has a reference to its parent, whose
        // driver has registered it, and is not unbound before it has unregistered it.
        let parent: &device::Device<Bound> = unsafe { device::Device::from_raw(parent.as_ptr()) };

        parent.try_into().ok().map(Self)
    }

    fn as_raw(&self) -> *mut bindings::pci_dev {
        // CAST: `pci::Device` is a transparent wrapper of a `struct pci_dev`.
        ptr::from_ref(self.0).cast_mut().cast()
    }

    /// Reads a byte of the PCI configuration space, or a value with all bits set if that fails.
    fn read_byte(&self, pos: usize) -> u8 {
        self.0.config_space().try_read8(pos).unwrap_or(u8::MAX)
    }

    /// Reads four bytes of the PCI configuration space, or a value with all bits set if that fails.
    fn read_dword(&self, pos: usize) -> u32 {
        self.0.config_space().try_read32(pos).unwrap_or(u32::MAX)
    }

    /// Returns where the first vendor-specific capability is, or the next one after `pos`.
    fn next_vendor_cap(&self, pos: Option<usize>) -> Option<usize> {
        // CAST: A capability's position is a byte, and the id is, too.
        //
        // SAFETY: The reference is to a valid device.
        let next = unsafe {
            match pos {
                None => {
                    bindings::pci_find_capability(self.as_raw(), bindings::PCI_CAP_ID_VNDR as c_int)
                }
                Some(pos) => bindings::pci_find_next_capability(
                    self.as_raw(),
                    pos as u8,
                    bindings::PCI_CAP_ID_VNDR as c_int,
                ),
            }
        };

        Some(next.into()).filter(|&next| next > 0)
    }

    /// Returns the length of a BAR in bytes, or 0 if there is none with this number.
    fn bar_len(&self, bar: u8) -> u64 {
        if u32::from(bar) >= bindings::PCI_STD_NUM_BARS {
            return 0;
        }
        self.0.resource_len(bar.into()).unwrap_or(0)
    }

    /// Returns the length of the configuration space of the capability at `pos`, limited to its
    /// BAR, in bytes.
    fn config_len_at(&self, pos: usize) -> u32 {
        use bindings::virtio_pci_cap as Cap;

        let bar = self.read_byte(pos + offset_of!(Cap, bar));
        let offset = self.read_dword(pos + offset_of!(Cap, offset));
        let length = self.read_dword(pos + offset_of!(Cap, length));
        let room = self.bar_len(bar).saturating_sub(offset.into());

        length.min(u32::try_from(room).unwrap_or(u32::MAX))
    }

    /// Returns the length of the shortest configuration space of all capabilities, in bytes: which
    /// capability the transport uses depends on their other fields.
    fn config_len(&self) -> u32 {
        /// The maximum number of capabilities: a longer list is circular.
        const MAX_CAPS: u32 = (bindings::PCI_CFG_SPACE_SIZE - bindings::PCI_STD_HEADER_SIZEOF)
            / bindings::PCI_CAP_SIZEOF;
        let mut shortest = None;
        let mut pos = None;

        for _ in 0..=MAX_CAPS {
            pos = self.next_vendor_cap(pos);
            let Some(pos) = pos else {
                return shortest.unwrap_or(0);
            };
            let kind = self.read_byte(pos + offset_of!(bindings::virtio_pci_cap, cfg_type));

            if u32::from(kind) == bindings::VIRTIO_PCI_CAP_DEVICE_CFG {
                let len = self.config_len_at(pos);
                shortest = Some(shortest.map_or(len, |shortest: u32| shortest.min(len)));
            }
        }
        0
    }

    /// Returns whether the device can be accessed.
    fn is_present(&self) -> bool {
        // SAFETY: The reference is to a valid device.
        unsafe { bindings::pci_device_is_present(self.as_raw()) }
    }
}

impl Device<Bound> {
    /// Returns the least length of the configuration space, in bytes, if there is a limit.
    /// `is_modern` is set if the device complies with version 1 of the specification.
    ///
    /// A read beyond its end is a `BUG()` in the PCI transport, which reads the length from a
    /// capability and does not export it. Memory beyond the end of the BAR is not mapped. Other
    /// transports, and devices from before virtio 1.0, have no length.
    pub(in crate::rust::virtio) fn config_len(&self, is_modern: bool) -> c_uint {
        #[cfg(CONFIG_PCI)]
        if let Some(pci) = PciDevice::of(self).filter(|_| is_modern) {
            return pci.config_len();
        }
        let _ = is_modern;
        c_uint::MAX
    }

    /// Returns whether the device was removed.
    pub(in crate::rust::virtio) fn is_gone(&self) -> bool {
        #[cfg(CONFIG_PCI)]
        return PciDevice::of(self).is_some_and(|pci| !pci.is_present());
        #[cfg(not(CONFIG_PCI))]
        false
    }

    /// Resets the device by `f`, or marks it as broken if it is gone, since the PCI transport would
    /// wait for it without end.
    ///
    /// # Safety
    ///
    /// Only one thread may reset the device, and `f` must be a function that does so.
    pub(in crate::rust::virtio) unsafe fn reset_by(
        &self,
        f: unsafe extern "C" fn(*mut bindings::virtio_device),
    ) {
        let f = match self.is_gone() {
            true => bindings::virtio_break_device,
            false => f,
        };

        // SAFETY: By the type invariants the device is valid. The caller guarantees the rest.
        unsafe { f(self.as_raw()) };
    }
}
