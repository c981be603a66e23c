// SPDX-License-Identifier: GPL-2.0

//! What the transport for PCI lacks: the length of the configuration space, and a reset that does
//! not wait forever for a device that was removed.
//!
//! C headers: [`include/uapi/linux/virtio_pci.h`](srctree/include/uapi/linux/virtio_pci.h),
//! [`include/linux/pci.h`](srctree/include/linux/pci.h)

use crate::rust::bindings;

use kernel::prelude::*;

/// A PCI device.
///
/// # Invariants
///
/// The pointer is valid for as long as the value exists.
#[cfg(CONFIG_PCI)]
struct PciDevice(core::ptr::NonNull<bindings::pci_dev>);

#[cfg(CONFIG_PCI)]
impl PciDevice {
    /// Returns the device that `vdev` is a function of, if that is a PCI device.
    ///
    /// # Safety
    ///
    /// `vdev` must be valid for as long as the result exists.
    unsafe fn of(vdev: *mut bindings::virtio_device) -> Option<Self> {
        // SAFETY: A device has a reference to its parent, which is part of a `struct pci_dev` if it
        // is on that bus.
        unsafe {
            let parent = (*vdev).dev.parent;

            if parent.is_null() || !bindings::dev_is_pci(parent) {
                return None;
            }
            // INVARIANT: It is valid as long as `vdev`.
            core::ptr::NonNull::new(kernel::container_of!(parent, bindings::pci_dev, dev)).map(Self)
        }
    }

    /// Reads a byte of the PCI configuration space, or a value with all bits set if that fails.
    fn read_byte(&self, pos: usize) -> u8 {
        let mut value = u8::MAX;

        // SAFETY: By the type invariants.
        unsafe { bindings::pci_read_config_byte(self.0.as_ptr(), pos as c_int, &mut value) };
        value
    }

    /// Reads four bytes of the PCI configuration space, or a value with all bits set if that fails.
    fn read_dword(&self, pos: usize) -> u32 {
        let mut value = u32::MAX;

        // SAFETY: By the type invariants.
        unsafe { bindings::pci_read_config_dword(self.0.as_ptr(), pos as c_int, &mut value) };
        value
    }

    /// Returns where the first vendor-specific capability is, or the next one after `pos`.
    fn next_vendor_cap(&self, pos: Option<usize>) -> Option<usize> {
        // CAST: A capability's position is a byte, and the id is, too.
        //
        // SAFETY: By the type invariants.
        let next = unsafe {
            match pos {
                None => bindings::pci_find_capability(
                    self.0.as_ptr(),
                    bindings::PCI_CAP_ID_VNDR as c_int,
                ),
                Some(pos) => bindings::pci_find_next_capability(
                    self.0.as_ptr(),
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
        // SAFETY: By the type invariants; there is such a BAR.
        unsafe { bindings::pci_resource_len(self.0.as_ptr(), c_int::from(bar)) }
    }

    /// Returns how much of the configuration space that the capability at `pos` describes is within
    /// its BAR, in bytes.
    fn config_len_at(&self, pos: usize) -> u32 {
        use bindings::virtio_pci_cap as Cap;
        use core::mem::offset_of;

        let bar = self.read_byte(pos + offset_of!(Cap, bar));
        let offset = self.read_dword(pos + offset_of!(Cap, offset));
        let length = self.read_dword(pos + offset_of!(Cap, length));
        let room = self.bar_len(bar).saturating_sub(offset.into());

        length.min(u32::try_from(room).unwrap_or(u32::MAX))
    }

    /// Returns the length of the shortest configuration space that a capability describes, in bytes:
    /// which one the transport takes depends on the rest of them.
    fn config_len(&self) -> u32 {
        /// How many capabilities there is room for: a list that has more is a circle.
        const MAX_CAPS: u32 = (bindings::PCI_CFG_SPACE_SIZE - bindings::PCI_STD_HEADER_SIZEOF)
            / bindings::PCI_CAP_SIZEOF;
        let mut shortest = None;
        let mut pos = None;

        for _ in 0..=MAX_CAPS {
            pos = self.next_vendor_cap(pos);
            let Some(pos) = pos else {
                return shortest.unwrap_or(0);
            };
            let kind =
                self.read_byte(pos + core::mem::offset_of!(bindings::virtio_pci_cap, cfg_type));

            if u32::from(kind) == bindings::VIRTIO_PCI_CAP_DEVICE_CFG {
                let len = self.config_len_at(pos);
                shortest = Some(shortest.map_or(len, |shortest: u32| shortest.min(len)));
            }
        }
        0
    }

    /// Returns whether the device can be accessed.
    fn is_present(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { bindings::pci_device_is_present(self.0.as_ptr()) }
    }
}

/// Returns a pointer to the lower 64 feature bits of a device.
///
/// # Safety
///
/// `vdev` must be a valid device.
pub(super) unsafe fn features_of(vdev: *mut bindings::virtio_device) -> *mut u64 {
    // SAFETY: By the requirements of this function. The field is a union of these bits and of all
    // bits as an array.
    unsafe { (&raw mut (*vdev).__bindgen_anon_1).cast() }
}

/// Returns how long the configuration space is at least, in bytes, as far as it can be too short.
///
/// To read beyond its end is a `BUG()` in the transport for PCI, which knows the length from a
/// capability and does not export it; and what is beyond the end of the BAR is not mapped. The other
/// transports, and devices from before virtio 1.0, have no length.
///
/// # Safety
///
/// `vdev` must be a valid device.
pub(super) unsafe fn config_len(vdev: *mut bindings::virtio_device) -> c_uint {
    #[cfg(CONFIG_PCI)]
    {
        // SAFETY: By the requirements of this function.
        let (pci, is_modern) = unsafe {
            (
                PciDevice::of(vdev),
                *features_of(vdev) & (1 << bindings::VIRTIO_F_VERSION_1) != 0,
            )
        };

        if let (Some(pci), true) = (pci, is_modern) {
            return pci.config_len();
        }
    }
    let _ = vdev;
    c_uint::MAX
}

/// Returns whether the device was removed: it does nothing any more.
///
/// # Safety
///
/// `vdev` must be a valid device.
pub(super) unsafe fn is_gone(vdev: *mut bindings::virtio_device) -> bool {
    #[cfg(CONFIG_PCI)]
    // SAFETY: By the requirements of this function.
    return unsafe { PciDevice::of(vdev) }.is_some_and(|pci| !pci.is_present());
    #[cfg(not(CONFIG_PCI))]
    {
        let _ = vdev;
        false
    }
}

/// Resets the device by `f`, or marks it as broken if it is gone: the transport for PCI would wait for
/// it without end.
///
/// # Safety
///
/// `vdev` must be a valid device, only one thread may reset it, and `f` must be a function that does
/// so.
pub(super) unsafe fn reset_by(
    f: unsafe extern "C" fn(*mut bindings::virtio_device),
    vdev: *mut bindings::virtio_device,
) {
    // SAFETY: By the requirements of this function.
    unsafe {
        match is_gone(vdev) {
            true => bindings::virtio_break_device(vdev),
            false => f(vdev),
        }
    }
}
